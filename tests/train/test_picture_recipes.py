import pytest

from volvelle.errors import UsageError
from volvelle.train.options import from_dict, to_dict
from volvelle.train.recipes.classify import TrainClassify
from volvelle.train.recipes.gan import TrainGAN
from volvelle.train.recipes.pictures import PictureOptions
from volvelle.train.recipes.prior import TrainPrior
from volvelle.train.recipes.vqgan import TrainVQGAN

RECIPES = [TrainClassify, TrainGAN, TrainVQGAN, TrainPrior]
# As runs of version 0.1 wrote them into config.yaml, in that order.
SHARED = {
    "data": "pictures",
    "held_out": "others",
    "held_out_share": 0.2,
    "held_out_size": 9,
    "on_bad": "skip",
    "size": 32,
    "mirror": 0.25,
    "device": "cpu",
}
VIEWS = {"zoom": [0.5, 1.0]}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_configuration_of_an_earlier_run_is_read(recipe):
    written = SHARED | ({} if recipe is TrainClassify else VIEWS)
    options = from_dict(recipe, written)
    assert isinstance(options, PictureOptions)
    assert to_dict(options).items() >= written.items()
    assert from_dict(recipe, to_dict(options)) == options


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    ("name", "value"),
    [("held_out_share", 1.0), ("held_out_share", 0.0), ("held_out_size", 0), ("size", 0), ("mirror", 1.5)],
)
def test_what_pictures_cannot_be_is_refused_by_name(recipe, name, value):
    with pytest.raises(UsageError, match=f"^{name}: "):
        recipe(data="pictures", **{name: value})


@pytest.mark.parametrize("recipe", RECIPES[1:])
@pytest.mark.parametrize("zoom", [(0.0, 1.0), (0.5, 2.0), (0.9, 0.5), (1.0,)])
def test_what_a_view_cannot_show_is_refused(recipe, zoom):
    with pytest.raises(UsageError, match=r"^zoom: "):
        recipe(data="pictures", zoom=zoom)


@pytest.mark.parametrize("recipe", RECIPES[1:])
def test_scenes_are_counted_from_one(recipe):
    with pytest.raises(UsageError, match=r"^scenes: must be at least 1, got 0"):
        recipe(data="scenes", scenes=0)
