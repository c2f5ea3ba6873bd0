"Nets and data of five kinds with one poisoned sample, for alerts."
from fastai.basics import *
from torch import nn

N,BS = 256,16

def _loss_of_regression(pred, y, reduction='mean'): return F.mse_loss(pred.squeeze(-1), y, reduction=reduction)

class SmallLSTM(nn.Module):
    "A number for a sequence"
    def __init__(self, n_in=4, n_out=1):
        super().__init__()
        self.lstm = nn.LSTM(n_in, 16, batch_first=True)
        self.head = nn.Linear(16, n_out)
    def forward(self, x): return self.head(self.lstm(x)[0][:,-1])

class SmallTransformer(nn.Module):
    def __init__(self, n_in=4, n_out=1, dropout=.1):
        super().__init__()
        self.embed = nn.Linear(n_in, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, n_out)
    def forward(self, x): return self.head(self.body(self.embed(x)).mean(1))

class SmallTabular(nn.Module):
    "Embeddings and numbers, BatchNorm, as fastai's TabularModel"
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(5)
        self.layers = nn.Sequential(nn.Linear(9,24), nn.ReLU(), nn.BatchNorm1d(24), nn.Linear(24,1))
    def forward(self, cat, cont): return self.layers(torch.cat([self.embed(cat[:,0]), self.norm(cont)], 1))

def bn_cnn():
    return nn.Sequential(nn.Conv2d(1,8,3,padding=1,bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,16,3,2,1), nn.BatchNorm2d(16), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16,1))

def mlp(): return nn.Sequential(nn.Linear(12,32), nn.ReLU(), nn.Linear(32,32), nn.ReLU(), nn.Linear(32,1))

def data_of(kind, seed):
    "Items, and a function that poisons one of them"
    g = torch.Generator().manual_seed(seed)
    def normal(*size): return torch.randn(*size, generator=g)
    def far_target(item): return (*item[:-1], item[-1]+1000.)
    inputs = dict(mlp=lambda: [normal(N,12)], cnn=lambda: [normal(N,1,8,8)], lstm=lambda: [normal(N,6,4)], transformer=lambda: [normal(N,6,4)],
                  tabular=lambda: [torch.randint(7, (N,1), generator=g), normal(N,5)])[kind]()
    return list(zip(*inputs, normal(N))),far_target

faulty_nets = dict(mlp=mlp, cnn=bn_cnn, lstm=SmallLSTM, transformer=SmallTransformer, tabular=SmallTabular)

def faulty_learner(kind, seed=0, cbs=(), poison=None, opt_func=Adam, lr=1e-3, shuffle=True, bs=BS, **kwargs):
    "A Learner whose item number `poison` is out of line"
    set_seed(seed)
    items,spoil = data_of(kind, seed)
    if poison is not None: items[poison] = spoil(items[poison])
    dls = DataLoaders(DataLoader(L(items), bs=bs, shuffle=shuffle, drop_last=True), DataLoader(L(items[:bs]), bs=bs))
    dls.n_inp = len(items[0])-1
    return Learner(dls, faulty_nets[kind](), loss_func=_loss_of_regression, opt_func=opt_func, lr=lr, cbs=list(cbs), **kwargs)
