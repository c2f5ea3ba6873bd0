"Twin nets: the same training twice, one of them changed in one place."
import math
from collections import namedtuple
from contextlib import nullcontext
import torch, torch.nn.functional as F
from torch import nn
from fastai_gradstats import GradRecorder

# --- nets whose places can be changed by attributes

class Residual(nn.Module):
    "x + scale*f(x)"
    def __init__(self, c, norm=True):
        super().__init__()
        self.conv1,self.conv2 = nn.Conv2d(c,c,3,1,1),nn.Conv2d(c,c,3,1,1)
        self.norm = nn.BatchNorm2d(c) if norm else nn.GroupNorm(2,c)
        self.act,self.scale = F.relu,.5
    def forward(self, x): return x+self.scale*self.conv2(self.act(self.norm(self.conv1(x))))

class TwinCNN(nn.Module):
    def __init__(self, norm=True):
        super().__init__()
        self.stem = nn.Conv2d(1,8,3,2,1)
        self.norm = nn.BatchNorm2d(8) if norm else nn.GroupNorm(2,8)
        self.blocks = nn.ModuleList(Residual(8, norm) for _ in range(3))
        self.head = nn.Linear(8*16,10)
        self.act = F.relu
    def forward(self, x):
        x = self.act(self.norm(self.stem(x)))
        for block in self.blocks: x = block(x)
        return self.head(x.flatten(1))

class TwinAttention(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.heads,self.scale = heads,(d//heads)**-.5
        self.q,self.k,self.v,self.proj = (nn.Linear(d,d) for _ in range(4))
        self.mask_value,self.fused = -math.inf,False
    def forward(self, x, padding):
        b,n,d = x.shape
        q,k,v = (f(x).view(b,n,self.heads,-1).transpose(1,2) for f in (self.q,self.k,self.v))
        if self.fused:
            mask = ~padding[:,None,None].expand(b,1,n,n)
            return self.proj(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.scale).transpose(1,2).reshape(b,n,d))
        scores = q@k.transpose(-1,-2)*self.scale
        scores = scores.masked_fill(padding[:,None,None], self.mask_value)
        return self.proj((scores.softmax(-1)@v).transpose(1,2).reshape(b,n,d))

class Block(nn.Module):
    def __init__(self, d, heads):
        super().__init__()
        self.norm1,self.attn,self.norm2 = nn.LayerNorm(d),TwinAttention(d,heads),nn.LayerNorm(d)
        self.up,self.down = nn.Linear(d,2*d),nn.Linear(2*d,d)
        self.act,self.scale = F.gelu,1.
    def forward(self, x, padding):
        x = x+self.scale*self.attn(self.norm1(x), padding)
        return x+self.scale*self.down(self.act(self.up(self.norm2(x))))

class TwinTransformer(nn.Module):
    "Tokens, of which 0 is padding"
    def __init__(self, d=32, n=3):
        super().__init__()
        self.emb,self.pos = nn.Embedding(20,d),nn.Parameter(torch.randn(12,d)*.1)
        self.blocks = nn.ModuleList(Block(d,4) for _ in range(n))
        self.norm,self.head = nn.LayerNorm(d),nn.Linear(d,10)
        self.masks = True
    def forward(self, x):
        padding = x==0 if self.masks else torch.zeros_like(x, dtype=torch.bool)
        h = self.emb(x)+self.pos
        for block in self.blocks: h = block(h, padding)
        return self.head(self.norm(h)[:,0])

class TwinLSTM(nn.Module):
    def __init__(self, d=24):
        super().__init__()
        self.emb = nn.Embedding(20,d)
        self.rnn1,self.rnn2 = nn.LSTM(d,d,batch_first=True),nn.LSTM(d,d,batch_first=True)
        self.hidden,self.head = nn.Linear(d,d),nn.Linear(d,10)
        self.act,self.between = torch.tanh,lambda h: h
    def forward(self, x):
        h,_ = self.rnn1(self.emb(x))
        h,_ = self.rnn2(self.between(h))
        return self.head(self.act(self.hidden(h[:,-1])))

class TwinTabular(nn.Module):
    "Two columns of categories, six of numbers"
    def __init__(self, d=32):
        super().__init__()
        self.embs = nn.ModuleList(nn.Embedding(20,6) for _ in range(2))
        self.lin1,self.norm1 = nn.Linear(18,d),nn.LayerNorm(d)
        self.lin2,self.norm2 = nn.Linear(d,d),nn.LayerNorm(d)
        self.head,self.act,self.tower = nn.Linear(d,10),F.relu,lambda e: e
    def forward(self, x):
        cats,conts = x[:,:2].long(),x[:,2:]
        e = self.tower(torch.cat([emb(cats[:,i]) for i,emb in enumerate(self.embs)], 1))
        h = self.act(self.norm1(self.lin1(torch.cat([e,conts], 1))))
        return self.head(self.act(self.norm2(self.lin2(h))))

def _pictures(g, n): return torch.randn(n,1,8,8, generator=g)
def _tokens(g, n):
    x = torch.randint(1, 20, (n,12), generator=g)
    x[:,8:] = torch.where(torch.rand(n,1, generator=g)>.5, x[:,8:], 0)
    return x
def _columns(g, n): return torch.cat([torch.randint(20, (n,2), generator=g).float(), torch.randn(n,6, generator=g)], 1)

TwinNet = namedtuple('TwinNet', 'make data')
twins = dict(cnn=TwinNet(TwinCNN, _pictures), plain_cnn=TwinNet(lambda: TwinCNN(False), _pictures), lstm=TwinNet(TwinLSTM, _tokens),
             transformer=TwinNet(TwinTransformer, _tokens), tabular=TwinNet(TwinTabular, _columns))

# --- a training

def fused_adam(params, **kw): return torch.optim.AdamW(params, fused=True, **kw)

def train_twin(name, seed=0, steps=4, bs=32, parts=1, divide=True, half=False, opt=torch.optim.AdamW, lr=1e-3, loss=F.cross_entropy, change=None,
               threads=1, shuffle=False, double=False, ready=None, **kw):
    "The record of a plain loop; `change(model)` changes one place, `shuffle` the order inside a batch"
    torch.manual_seed(seed)
    model = twins[name].make()
    g = torch.Generator().manual_seed(seed)
    xs,ys = twins[name].data(g, steps*bs),torch.randint(10, (steps*bs,), generator=g)
    if change: change(model)
    if double:
        model.double()
        xs = xs.double() if xs.is_floating_point() else xs
    opt = opt(model.parameters(), lr=lr)
    if ready: ready(model, opt)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with GradRecorder(model, opt, **kw) as rec:
            for i in range(steps):
                rows = torch.arange(i*bs, (i+1)*bs)
                if shuffle: rows = rows[torch.randperm(bs, generator=torch.Generator().manual_seed(i))]
                for part in rows.chunk(parts):
                    with torch.autocast('cpu', torch.bfloat16) if half else nullcontext(): value = call_loss(loss, model, xs[part], ys[part])
                    rec.loss(value)
                    (value/parts if divide else value).backward()
                opt.step()
                opt.zero_grad()
    finally: torch.set_num_threads(before)
    return rec.record

def call_loss(loss, model, x, y):
    "A loss of outputs and targets, or one that wants the model too"
    out = model(x)
    return loss(out.float() if out.dtype==torch.bfloat16 else out, y, model) if getattr(loss, 'of_model', False) else loss(out.float() if out.dtype==torch.bfloat16 else out, y)
