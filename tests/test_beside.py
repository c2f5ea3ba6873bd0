"Libraries that build on fastai, with learners as their users make them: random weights, small data."
import pytest
from fastai.basics import *
from fastai.vision.all import CrossEntropyLossFlat,vision_learner
from helpers.learners import check_watched,picture_loaders,watched_learner
from helpers.training import KeepsLosses,both_callbacks,fit,same_tensors

pytestmark = pytest.mark.slow

def timm_learner(**kw):
    "An architecture that is named, and not torchvision's"
    pytest.importorskip('timm')
    return vision_learner(picture_loaders(), 'resnet18d', pretrained=False, n_out=2, loss_func=CrossEntropyLossFlat(), **kw)

def tsai_learner(arch, **kw):
    "Series of three variables in two classes"
    tsai = pytest.importorskip('tsai.basics')
    g = np.random.default_rng(0)
    x = g.normal(size=(16,3,20)).astype(np.float32)
    y = np.array(['no','yes']*8)
    dls = tsai.get_ts_dls(x, y, splits=(list(range(12)),list(range(12,16))), tfms=[None,tsai.TSClassification()], bs=4, num_workers=0)
    return tsai.ts_learner(dls, arch, **kw)

def fastmonai_learner(**kw):
    "Volumes in files, a mask for each, and a U-Net of MONAI"
    vision = pytest.importorskip('fastMONAI.vision_all')
    from monai.losses import DiceLoss
    from monai.networks.nets import UNet
    from torchio import LabelMap,ScalarImage
    folder = Path('volumes')
    folder.mkdir(exist_ok=True)
    g = torch.Generator().manual_seed(0)
    def saved(image, name):
        image.save(folder/name)
        return str(folder/name)
    rows = []
    for i in range(6):
        volume = torch.randn(1,8,8,8, generator=g)
        rows.append(dict(image=saved(ScalarImage(tensor=volume), f'{i}.nii.gz'), valid=i>=4,
                         mask=saved(LabelMap(tensor=(volume>1).to(torch.uint8)), f'{i}-mask.nii.gz')))
    dls = vision.MedImageDataLoaders.from_df(pd.DataFrame(rows), fn_col='image', label_col='mask', valid_col='valid',
                                             y_block=vision.MedMaskBlock(), bs=2, num_workers=0)
    model = UNet(spatial_dims=3, in_channels=1, out_channels=1, channels=(4,8), strides=(2,), num_res_units=1)
    return Learner(dls, model, loss_func=vision.CustomLoss(DiceLoss(sigmoid=True)), **kw)

learners = dict(timm=timm_learner, inception_time=partial(tsai_learner, 'InceptionTimePlus'), time_series_transformer=partial(tsai_learner, 'TSTPlus'),
                fastmonai=fastmonai_learner)
each_learner = pytest.mark.parametrize('make', learners.values(), ids=learners)

@each_learner
def test_rows(make):
    "Each output's row is autograd's, each parameter's is the optimizer's, and no hook is left"
    learn,twin,spy = watched_learner(make)
    fit(learn, 2)
    check_watched(learn, twin, spy)

def trained_by(make, *cbs):
    "Losses and weights after two epochs"
    set_seed(0)
    learn = fit(make(cbs=[*cbs, (seen := KeepsLosses())]), 2)
    return [*seen.losses, *(p.detach() for p in learn.model.parameters())]

@each_learner
def test_same_bits(make):
    "Losses and weights are those of a training without the callbacks"
    assert same_tensors(trained_by(make), trained_by(make, *both_callbacks()))
