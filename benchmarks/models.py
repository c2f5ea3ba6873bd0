"The models that are measured, each in a Learner with one fixed batch"
from fastai.basics import *
from fastai.layers import ConvLayer
from torchvision.models import resnet18, resnet34

class Transformer(nn.Module):
    "An encoder with a vocabulary, and a class per token"
    def __init__(self, layers, vocab, d=128, classes=10):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.enc = nn.TransformerEncoder(nn.TransformerEncoderLayer(d, 4, 4*d, batch_first=True), layers, enable_nested_tensor=False)
        self.head = nn.Linear(d, classes)
    def forward(self, x): return self.head(self.enc(self.emb(x))).transpose(1, 2)

class GPT(nn.Module):
    "A decoder without dropout that predicts the next token"
    def __init__(self, layers, d, vocab, n):
        super().__init__()
        self.emb = nn.Embedding(vocab, d)
        self.pos = nn.Embedding(n, d)
        layer = nn.TransformerEncoderLayer(d, d//64 or 1, 4*d, dropout=0, activation='gelu', batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(d, vocab, bias=False)
    def forward(self, x):
        n = x.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(n, device=x.device)
        return self.head(self.blocks(self.emb(x)+self.pos.weight[:n], mask, is_causal=True)).transpose(1, 2)

def convnet():
    "Cheap convolutions; at batch size 64 the outputs have 40 times the elements of the parameters"
    return nn.Sequential(*(ConvLayer(i, o, stride=2) for i,o in ((3,16), (16,32), (32,64))), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))

def images(bs, side): return torch.randn(bs, 3, side, side),torch.randint(10, (bs,))
def tokens(vocab, bs=16, n=64): return torch.randint(vocab, (bs,n)),torch.randint(10, (bs,n))

def texts(vocab, bs, n): return torch.randint(vocab, (bs,n)),torch.randint(vocab, (bs,n))

def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 10))

models = {  # name -> functions that make the model and its batch
    'resnet18':      (partial(resnet18, num_classes=10), partial(images, 32, 64)),
    'resnet34':      (partial(resnet34, num_classes=10), partial(images, 32, 64)),
    'linear':        (linear, partial(images, 8, 4)),
    'convnet':       (convnet, partial(images, 64, 32)),
    'transformer-4': (partial(Transformer, 4, 1_000), partial(tokens, 1_000)),
    'transformer-6': (partial(Transformer, 6, 30_000), partial(tokens, 30_000))}

class NoValid(Callback):
    "Training only"
    def before_validate(self): raise CancelValidException('not measured')

def learner(name, # a key of `models`
            steps, # batches in an epoch
            cbs=()
           )->Learner:
    "The same weights and batch whenever it is called"
    set_seed(0)
    model,batch = models[name]
    model,b = model(),batch()
    return Learner(DataLoaders([b]*steps, [b]), model, loss_func=nn.CrossEntropyLoss(), cbs=[NoValid(), *cbs])
