"""Views are functions of (stage seed, source, sample, epoch, view); carried out, they are what the plan says."""

from __future__ import annotations

import colorsys

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from terrace.data.views.augment import make_views
from terrace.data.views.plans import ViewPlan, plan_views
from terrace.recipe.rules import check
from terrace.recipe.schema import Recipe
from terrace.recipe.schema_views import PUBLISHED_VIEWS, View

WHOLE = ViewPlan(32, (0, 0, 32, 32), False)


def squares(count: int, side: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def test_plans_depend_on_the_sample_and_its_epoch_alone():
    dino = PUBLISHED_VIEWS["dino"]
    plans = plan_views(dino, 224, 3, "web", "a/1", 2)
    assert plans == plan_views(dino, 224, 3, "web", "a/1", 2)
    assert [plan.side for plan in plans] == [224] * 2 + [96] * 8
    assert len({plan.box for plan in plans}) == 10
    for other in ((4, "web", "a/1", 2), (3, "net", "a/1", 2), (3, "web", "a/2", 2), (3, "web", "a/1", 3)):
        assert plan_views(dino, 224, *other) != plans
    # A changed chance moves nothing else: another blur leaves every cut, flip and colour where it was.
    sharp = [view.model_copy(update={"blur": 0.0}) for view in dino]
    for plan, same in zip(plans, plan_views(sharp, 224, 3, "web", "a/1", 2)):
        assert (plan.box, plan.flipped, plan.jitter, plan.grey) == (same.box, same.flipped, same.jitter, same.grey)
        assert not same.blur_sigma
    assert str(WHOLE) == "32x32 at (0, 0) to 32x32"
    told = str(ViewPlan(96, (3, 4, 20, 30), True, (("hue", 0.05), ("contrast", 1.2)), True, 0.5, True))
    assert told == "20x30 at (3, 4) to 96x96, mirrored, hue 0.05, contrast 1.2, grey, blur 0.5, solarised"


def test_chances_and_ranges_are_those_asked_for():
    view = View(area=(0.1, 0.5), flip=0.3, jitter=0.6, hue=0.0, grey=0.2, blur=0.7, solarise=0.4)
    plans = [plan_views([view], 200, 0, "s", str(number), 0)[0] for number in range(3_000)]
    for name, chance in (("flipped", 0.3), ("jitter", 0.6), ("grey", 0.2), ("blur_sigma", 0.7), ("solarised", 0.4)):
        assert abs(np.mean([bool(getattr(plan, name)) for plan in plans]) - chance) < 0.03, name
    boxes = np.asarray([plan.box for plan in plans])
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 200).all()
    areas, aspects = boxes[:, 2] * boxes[:, 3] / 200**2, boxes[:, 2] / boxes[:, 3]
    assert 0.095 < areas.min() < 0.12
    assert 0.48 < areas.max() < 0.51
    assert 0.72 < aspects.min() < 0.78
    assert 1.28 < aspects.max() < 1.38
    factors = np.asarray([value for plan in plans for name, value in plan.jitter if name == "contrast"])
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    orders = {tuple(name for name, _ in plan.jitter) for plan in plans if plan.jitter}
    assert len(orders) == 6
    assert not any("hue" in order for order in orders)


def test_cuts_resizes_and_colours_are_those_of_other_implementations():
    pixels = squares(5, 64)
    floats = pixels.float() / 255
    for box, side in (((3, 5, 40, 50), 32), ((0, 0, 64, 64), 24), ((10, 20, 9, 7), 32)):
        left, top, width, height = box
        cut = floats[:, :, top : top + height, left : left + width]
        wanted = F.interpolate(cut, size=(side, side), mode="bilinear", antialias=True)
        torch.testing.assert_close(make_views(pixels, [ViewPlan(side, box, False)] * 5), wanted, atol=1e-5, rtol=0)
        torch.testing.assert_close(make_views(pixels, [ViewPlan(side, box, True)] * 5), wanted.flip(3), atol=1e-5, rtol=0)
        image = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).crop((left, top, left + width, top + height))
        published = torch.from_numpy(np.asarray(image.resize((side, side), Image.Resampling.BILINEAR)).copy()).permute(2, 0, 1)
        assert float((wanted[0] * 255 - published).abs().max()) <= 1.0
    pixels = squares(4, 32)
    floats = pixels.float() / 255
    grey = (floats * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)

    def changed(**plan):
        return make_views(pixels, [ViewPlan(32, WHOLE.box, False, **plan)] * 4)

    torch.testing.assert_close(changed(), floats)
    torch.testing.assert_close(changed(grey=True), grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(changed(solarised=True), torch.where(pixels >= 128, 1 - floats, floats))
    torch.testing.assert_close(changed(jitter=(("brightness", 1.3),)), (1.3 * floats).clamp(0, 1))
    torch.testing.assert_close(changed(jitter=(("saturation", 0.5),)), 0.5 * floats + 0.5 * grey)
    mean = grey.mean((2, 3), keepdim=True)
    torch.testing.assert_close(changed(jitter=(("contrast", 0.5), ("brightness", 0.5))), 0.25 * floats + 0.25 * mean)
    turned = changed(jitter=(("hue", 0.15),))
    for place in range(0, 32, 5):
        hue, saturation, value = colorsys.rgb_to_hsv(*floats[1, :, place, 3].tolist())
        wanted = torch.tensor(colorsys.hsv_to_rgb((hue + 0.15) % 1, saturation, value))
        torch.testing.assert_close(turned[1, :, place, 3], wanted, atol=1e-5, rtol=0)
    places = torch.arange(32.0)
    weights = torch.exp(-((places - 12) ** 2) / (2 * 1.5**2))
    across = torch.exp(-((places - 20) ** 2) / (2 * 1.5**2))
    blurred = (floats[2, 0] * weights[:, None] * across).sum() / (weights.sum() * across.sum())
    torch.testing.assert_close(changed(blur_sigma=1.5)[2, 0, 12, 20], blurred)


def test_a_picture_s_views_do_not_depend_on_its_neighbours():
    pixels, views = squares(6, 48), [view.model_copy(update={"side": None}) for view in PUBLISHED_VIEWS["dino"]]
    plans = [plan_views(views, 48, 0, "s", str(number), 1)[1] for number in range(6)]
    together = make_views(pixels, plans)
    alone = torch.cat([make_views(pixels[place : place + 1], plans[place : place + 1]) for place in range(6)])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_what_cannot_be_is_named_with_its_place():
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tower |= {"image_size": 64, "patch_size": 8}

    def told(objective="simclr", model=("vit", tower), **stage):
        defaults = {"train": {"vision": {"lr": 1e-3}, "heads": {"lr": 1e-3}}, "mixture": {"pictures": 1.0}, "budget": {"steps": 2}}
        values = {"name": "one", "objective": objective, "batch": {"packs": 2, "samples_per_pack": 2}, **defaults, **stage}
        return [str(problem) for problem in check(Recipe.model_validate({
            "name": "views", "model": {"architecture": model[0], "config": model[1]}, "tokenizer": {"train_vocabulary_size": 330},
            "data": {"sources": {"pictures": {"uri": "nowhere", "kind": "picture"}}}, "stages": [values],
        }))]  # fmt: skip

    assert told() == told("byol") == told("instance_discrimination") == []
    cases = [
        ({"objective": "mae"}, "vit_mae"),
        ({"objective": "dino"}, "side 96 is more than the tower's image_size 64"),
        ({"objective": "dino", "views": [{}]}, "needs two whole ones"),
        ({"views": [{"count": 3}]}, "simclr sees 2 of each picture"),
        ({"views": [{}, {"side": 60}]}, "no multiple of the tower's patch_size 8"),
        ({"views": [{}, {"area": [0.5, 0.1]}]}, "area goes from 0.5 to 0.1"),
        ({"objective": "cpc", "cpc": {"grid": 4, "ahead": 2}}, "4 squares of 25.6 pixels overlap by half in a view of 64"),
        ({"objective": "cpc", "cpc": {"grid": 3}}, "5 rows below a row are not there in a grid of 3"),
        ({"train": {"vision": {"lr": 1.0}}}, "trains heads: give train.heads its lr"),
        ({"train": {"vision": {"lr": 1.0, "lora": {}}, "heads": {"lr": 1.0}}}, "its teacher follows whole weights"),
        ({"parallel": {"strategy": "zero3"}}, "use fsdp"),
        ({"batch": {"packs": 1, "samples_per_pack": 1}}, "two pictures or more"),
        ({"byol": {}}, "is an option of objective byol"),
        ({"objective": "mae", "views": [{}, {}]}, "mae sees 1 of each picture"),
    ]
    mae = {**tower, **{f"decoder_{name}": 8 for name in ("hidden_size", "intermediate_size", "num_hidden_layers")}}
    mae |= {"decoder_num_attention_heads": 2, "norm_pix_loss": True}
    for stage, words in cases:
        model = ("vit_mae", mae) if "views" in stage and stage.get("objective") == "mae" else ("vit", tower)
        lines = told(model=model, **stage)
        assert any(words in line for line in lines), (stage, lines)
    assert told(model=("vit_mae", mae), train={"vision": {"lr": 1e-3}, "heads": {"lr": 1e-3}, "projector": {"lr": 1e-3}})
