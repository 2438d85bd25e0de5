import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from model import losses
from tests.model.examples import HW, ellipse, image, rectangle, target, tiny_network

SUPERVISED = {
    "loss_objectness",
    "loss_rpn_box_reg",
    "loss_classifier",
    "loss_box_reg",
    "loss_mask",
    "loss_box_iou",
    "loss_mask_iou",
}
SEMI = {"semi_" + name for name in SUPERVISED - {"loss_box_iou", "loss_mask_iou"}}
OBJECTS = ((1, rectangle(8, 8, 30, 28)), (2, ellipse(24, 32, 60, 60)))


def eq_4(labels):
    """The factor p* in front of the classification loss, (R,) -> (R, 3)."""
    return torch.stack([(labels > 0).float(), torch.ones(len(labels)), torch.ones(len(labels))], dim=1)


def total(result):
    return losses.total_loss(result, beta=0.01, iou_weight=1.0)


def watch(network):
    """Keep what the heads put out in a training pass, with gradients: for each group of images one entry."""
    seen = {"rpn": [], "anchors": [], "classes": [], "positive_rois": []}

    def keep_rpn(module, inputs, output):
        for level in output[0]:
            level.retain_grad()
        seen["rpn"].append(output)

    def keep_classes(module, inputs, output):
        output[0].retain_grad()
        seen["classes"].append(output[0])

    network.rpn.head.register_forward_hook(keep_rpn)
    network.rpn.anchor_generator.register_forward_hook(lambda module, inputs, output: seen["anchors"].append(output))
    network.roi_heads.box_predictor.register_forward_hook(keep_classes)
    network.roi_heads.mask_head.register_forward_hook(
        lambda module, inputs, output: seen["positive_rois"].append(len(output))
    )
    return seen


def sample_alike(network):
    """Choose the same anchors and RoIs in each pass: torchvision's transform draws a random number for each image."""
    network.backbone.register_forward_hook(lambda module, inputs, output: torch.manual_seed(1) and None)


def objectness_gradients(seen, network, targets, group=0):
    """Gradients (A,) of the objectness logits and their anchors' labels (A,): 1 object, 0 background, -1 neither."""
    objectness, deltas = seen["rpn"][group]
    gradients, _ = concat_box_prediction_layers([level.grad for level in objectness], list(deltas))
    labels, _ = network.rpn.assign_targets_to_anchors(seen["anchors"][group], targets)
    return gradients.flatten(), torch.cat(labels)


# --- eq. 4 on the losses themselves


@pytest.mark.parametrize("positives_only", [False, True], ids=["annotated", "pseudo-labelled"])
def test_objectness_gradient_by_hand(positives_only):
    objectness = torch.zeros(6, requires_grad=True)
    result = losses.rpn_losses(
        objectness,
        torch.zeros(6, 4),
        labels=torch.tensor([1.0, 0, 0, 1, 0, 1]),
        delta_targets=torch.zeros(6, 4),
        sampled=torch.tensor([0, 3, 1, 4]),  # N_cls = 4; anchors 2 and 5 are not sampled
        weights=eq_4(torch.tensor([1, 1, 0, 0])) if positives_only else None,
    )
    result["loss_objectness"].backward()
    # entropy of a logit 0 is ln 2, its gradient (0.5 - label) / N_cls = -+ 0.5 / 4
    background = 0.0 if positives_only else 0.125
    assert objectness.grad.tolist() == [-0.125, background, 0.0, -0.125, background, 0.0]
    counted = 2 if positives_only else 4
    assert result["loss_objectness"].item() == pytest.approx(counted * math.log(2) / 4)


@pytest.mark.parametrize("positives_only", [False, True], ids=["annotated", "pseudo-labelled"])
def test_class_gradient_by_hand(positives_only):
    logits = torch.zeros(5, 3, requires_grad=True)
    result = losses.box_head_losses(
        logits,
        torch.zeros(5, 12),
        labels=torch.tensor([0, 2, 0, 1, 0]),
        delta_targets=torch.zeros(5, 4),
        weights=eq_4(torch.tensor([0, 2, 0, 1, 0])) if positives_only else None,
        sampled_count=5,
    )
    result["loss_classifier"].backward()
    # softmax of equal logits is 1/3; (1/3 - one hot) / N_cls with N_cls = 5 for both kinds of image
    third, minus = 1 / 15, -2 / 15
    background = [0.0, 0.0, 0.0] if positives_only else [minus, third, third]
    expected = [background, [third, third, minus], background, [third, minus, third], background]
    torch.testing.assert_close(logits.grad, torch.tensor(expected))
    if positives_only:
        assert torch.equal(logits.grad[[0, 2, 4]], torch.zeros(3, 3))
    counted = 2 if positives_only else 5
    assert result["loss_classifier"].item() == pytest.approx(counted * math.log(3) / 5)


@pytest.mark.parametrize("pseudo", [False, True], ids=["annotated", "pseudo-labelled"])
def test_box_and_mask_losses_do_not_depend_on_the_kind_of_image(pseudo):
    torch.manual_seed(0)
    logits, coverage = torch.randn(3, 28, 28), torch.rand(3, 28, 28)
    deltas, targets = torch.randn(6, 4), torch.randn(6, 4)
    labels, sampled = torch.tensor([1.0, 0, 0, 1, 0, 1]), torch.tensor([0, 3, 1, 4])

    def weights(labels):
        return eq_4(labels) if pseudo else None

    rpn = losses.rpn_losses(
        torch.zeros(6),
        deltas,
        labels=labels,
        delta_targets=targets,
        sampled=sampled,
        weights=weights(labels[sampled]),
    )
    heads = losses.box_head_losses(
        torch.zeros(6, 3),
        deltas.repeat(1, 3),
        labels=labels.long(),
        delta_targets=targets,
        weights=weights(labels),
        sampled_count=6,
    )
    torch.testing.assert_close(rpn["loss_rpn_box_reg"], huber(deltas[[0, 3]], targets[[0, 3]]) / 4)
    torch.testing.assert_close(heads["loss_box_reg"], huber(deltas[[0, 3, 5]], targets[[0, 3, 5]]) / 6)
    torch.testing.assert_close(
        losses.mask_loss(logits, coverage, weights=weights(torch.ones(3))),
        F.binary_cross_entropy_with_logits(logits, coverage),
    )


def huber(deltas, targets):
    return F.smooth_l1_loss(deltas, targets, beta=1 / 9, reduction="sum")


def test_every_term_is_weighed_by_its_own_column():
    torch.manual_seed(0)
    logits, coverage = torch.randn(2, 28, 28), torch.rand(2, 28, 28)
    deltas, targets, nothing = torch.randn(3, 4), torch.randn(3, 4), torch.zeros(3, 4)
    weights = torch.tensor([[0.9, 0.5, 0.1], [0.8, 0.0, 0.3], [0.25, 0.7, 0.7]])
    labels = torch.tensor([1, 2, 0])  # two objects and one background
    rpn = losses.rpn_losses(
        torch.zeros(3), deltas, labels=labels.clamp(max=1).float(), delta_targets=nothing,
        sampled=torch.arange(3), weights=weights,
    )  # fmt: skip
    heads = losses.box_head_losses(
        torch.zeros(3, 3), deltas.repeat(1, 3), labels=labels, delta_targets=targets, weights=weights, sampled_count=3
    )
    counted = 0.9 + 0.8 + 0.25
    assert rpn["loss_objectness"].item() == pytest.approx(counted * math.log(2) / 3)
    assert heads["loss_classifier"].item() == pytest.approx(counted * math.log(3) / 3)
    torch.testing.assert_close(rpn["loss_rpn_box_reg"], 0.5 * huber(deltas[0], nothing[0]) / 3)
    torch.testing.assert_close(heads["loss_box_reg"], 0.5 * huber(deltas[0], targets[0]) / 3)
    each = F.binary_cross_entropy_with_logits(logits, coverage, reduction="none").mean(dim=(1, 2))
    torch.testing.assert_close(
        losses.mask_loss(logits, coverage, weights=weights[:2]), (0.1 * each[0] + 0.3 * each[1]) / 2
    )


# --- eq. 4 through the whole network


def test_no_background_anchor_of_a_pseudo_labelled_image_has_a_gradient_and_the_heads_see_objects_alone():
    network, targets = tiny_network(), [target(*OBJECTS, pseudo=True)]
    seen = watch(network)
    result = network([image()], targets)
    assert set(result) == SEMI
    total(result).backward()

    gradients, labels = objectness_gradients(seen, network, targets)
    assert torch.equal(gradients[labels != 1], torch.zeros_like(gradients[labels != 1]))
    assert (gradients[labels == 1] < 0).any()
    rows = (seen["classes"][0].grad != 0).any(dim=1)
    assert 0 < rows.sum() == seen["positive_rois"][0] == len(rows)


def test_background_of_an_annotated_image_does_have_a_gradient():
    network, targets = tiny_network(), [target(*OBJECTS)]
    seen = watch(network)
    result = network([image()], targets)
    assert set(result) == SUPERVISED
    total(result).backward()

    gradients, labels = objectness_gradients(seen, network, targets)
    assert (gradients[labels == 0] > 0).any()
    assert (seen["classes"][0].grad != 0).any(dim=1).all()
    assert seen["positive_rois"][0] < len(seen["classes"][0])


def test_of_a_pseudo_labelled_image_the_rois_that_overlap_a_label_count_among_all_that_were_sampled():
    network = tiny_network()
    seen = watch(network)
    on_object = torch.tensor([[8.0, 8, 30, 28], [9, 9, 30, 28]])
    on_nothing = torch.tensor([[40.0, 0, 60, 20], [0, 40, 20, 60], [45, 5, 63, 20]])
    result = network.roi_heads.losses(
        network.backbone(image()[None]),
        [torch.cat([on_object, on_nothing])],
        [HW],
        [target(OBJECTS[0], pseudo=True)],
        pseudo=True,
    )
    (logits,) = seen["classes"]
    assert len(logits) == 3  # the labelled box itself is appended, so that six were sampled
    value, samples = result["loss_classifier"]
    torch.testing.assert_close(value, F.cross_entropy(logits, torch.ones(3).long(), reduction="sum") / 6)
    assert samples == result["loss_box_reg"].samples == 6
    assert result["loss_mask"].samples == 3


def test_the_iou_branches_get_no_gradient_from_pseudo_labelled_images():
    network = tiny_network()
    branches = [*network.roi_heads.box_iou_branch.parameters(), *network.roi_heads.mask_iou_branch.parameters()]
    total(network([image()], [target(*OBJECTS, pseudo=True)])).backward()
    assert [parameter.grad for parameter in branches] == [None] * len(branches)
    total(network([image()], [target(*OBJECTS)])).backward()
    assert all(parameter.grad is not None and (parameter.grad != 0).any() for parameter in branches)


def test_a_pseudo_labelled_image_in_the_batch_changes_nothing_in_what_the_iou_branches_learn():
    gradients = []
    for others in ([], [target(OBJECTS[0], pseudo=True)]):
        network = tiny_network(frozen_batch_norm=True)
        sample_alike(network)
        total(network([image(seed=i) for i in range(1 + len(others))], [target(*OBJECTS), *others])).backward()
        gradients.append([p.grad for p in network.roi_heads.mask_iou_branch.parameters()])
    for alone, mixed in zip(*gradients, strict=True):
        torch.testing.assert_close(mixed, alone, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("annotated_at", [0, 1], ids=["annotated first", "pseudo-labelled first"])
def test_the_supervised_losses_of_a_mixed_batch_are_those_of_its_annotated_image_alone(annotated_at):
    network = tiny_network(frozen_batch_norm=True)  # else the images of a batch meet in its statistics
    images, targets = [image(seed=1)], [target(OBJECTS[0], pseudo=True)]
    images.insert(annotated_at, image(seed=0))
    targets.insert(annotated_at, target(*OBJECTS))
    sample_alike(network)
    alone = network([image(seed=0)], [target(*OBJECTS)])
    mixed = network(images, targets)
    assert set(alone) == SUPERVISED
    assert set(mixed) == SUPERVISED | SEMI
    for name, loss in alone.items():
        assert mixed[name].item() == pytest.approx(loss.item(), rel=1e-4), name


def test_logits_of_annotated_images_get_no_gradient_from_pseudo_labelled_ones():
    network = tiny_network(frozen_batch_norm=True)
    seen = watch(network)
    result = network([image(seed=0), image(seed=1)], [target(*OBJECTS), target(OBJECTS[0], pseudo=True)])
    sum(loss for name, loss in result.items() if name.startswith(losses.SEMI)).backward()
    assert seen["classes"][0].grad is None
    assert all(level.grad is None for level in seen["rpn"][0][0])
    assert seen["classes"][1].grad is not None


# --- eq. 1 and 5


def test_total_loss_weighs_the_terms_as_equations_1_and_5_say():
    terms = {
        "loss_classifier": 1.0,
        "loss_box_iou": 2.0,
        "loss_mask_iou": 3.0,
        "semi_loss_classifier": 10.0,
        "semi_loss_mask": 20.0,
    }
    tensors = {name: torch.tensor(value, requires_grad=True) for name, value in terms.items()}
    # L_sup = 1 + 0.5 (2 + 3) = 3.5; L_semi = 30; 3.5 + 0.01 * 30 = 3.8
    result = losses.total_loss(tensors, beta=0.01, iou_weight=0.5)
    assert result.item() == pytest.approx(3.8)
    result.backward()
    assert [tensor.grad.item() for tensor in tensors.values()] == pytest.approx([1.0, 0.5, 0.5, 0.01, 0.01])


def test_pseudo_labels_may_teach_what_is_there_without_its_outline():
    tensors = {name: torch.tensor(1.0) for name in losses.NAMES}
    whole, without = (
        losses.total_loss(tensors, beta=0.25, iou_weight=1.0, pseudo_outlines=outlines) for outlines in (True, False)
    )
    assert whole - without == pytest.approx(0.25 * 3)  # the boxes of both stages, and the masks


def test_iou_loss_is_the_mean_squared_difference():
    # ((0.5 - 0.7)^2 + (0.9 - 0.4)^2) / 2 = (0.04 + 0.25) / 2
    assert losses.iou_loss(torch.tensor([0.5, 0.9]), torch.tensor([0.7, 0.4])).item() == pytest.approx(0.145)


@pytest.mark.parametrize(
    "loss_without_positives",
    [
        pytest.param(lambda x: losses.iou_loss(x[:0, 0], torch.zeros(0)), id="IoU branches"),
        pytest.param(lambda x: losses.mask_loss(x[:0, :, None], torch.zeros(0, 12, 1)), id="masks"),
        pytest.param(
            lambda x: losses.box_head_losses(
                x[:, :3],
                x,
                labels=torch.zeros(4).long(),
                delta_targets=torch.zeros(4, 4),
                weights=eq_4(torch.zeros(4)),
                sampled_count=4,
            )["loss_classifier"],
            id="classes of a pseudo-labelled image",
        ),
        pytest.param(
            lambda x: losses.box_head_losses(
                x[:, :3],
                x,
                labels=torch.zeros(4).long(),
                delta_targets=torch.zeros(4, 4),
                weights=None,
                sampled_count=4,
            )["loss_box_reg"],
            id="boxes",
        ),
        pytest.param(
            lambda x: sum(
                losses.rpn_losses(
                    x[:, 0],
                    x[:, :4],
                    labels=torch.zeros(4),
                    delta_targets=torch.full((4, 4), -math.inf),  # what encoding against no box gives
                    sampled=torch.tensor([0, 1]),
                    weights=eq_4(torch.zeros(2)),
                ).values()
            ),
            id="RPN of a pseudo-labelled image",
        ),
    ],
)
def test_without_positives_a_loss_is_zero_with_a_finite_gradient(loss_without_positives):
    x = torch.randn(4, 12, requires_grad=True)
    loss = loss_without_positives(x)
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(x.grad, torch.zeros_like(x))


# --- on annotated images the losses of Mask R-CNN are torchvision's


def test_box_head_losses_agree_with_torchvision():
    torch.manual_seed(0)
    logits, deltas, targets = torch.randn(40, 4), torch.randn(40, 16), torch.randn(40, 4)
    labels = torch.randint(0, 4, (40,))
    ours = losses.box_head_losses(logits, deltas, labels=labels, delta_targets=targets, weights=None, sampled_count=40)
    classes, boxes = fastrcnn_loss(logits, deltas, [labels], [targets])
    torch.testing.assert_close(ours, {"loss_classifier": classes, "loss_box_reg": boxes})


def test_mask_loss_agrees_with_torchvision_where_cells_are_whole_pixels():
    # torchvision samples masks with aligned=False, half a pixel too far down and right, and blurs edges between pixels
    torch.manual_seed(0)
    boxes = torch.tensor([[4.0, 2, 32, 30], [28, 32, 56, 60]])
    masks = target(*OBJECTS)["masks"]
    logits, matched, labels = torch.randn(2, 3, 28, 28), torch.tensor([0, 1]), torch.tensor([1, 2])
    coverage = losses.mask_coverage([masks], [matched], [boxes], 28)
    ours = losses.mask_loss(logits[torch.arange(2), labels], coverage)
    theirs = maskrcnn_loss(logits, [boxes - 0.5], [masks], [labels], [matched])
    torch.testing.assert_close(ours, theirs)
    assert 0 < coverage.mean() < 1


def test_proposals_and_losses_of_the_rpn_agree_with_torchvision():
    network, targets = tiny_network(), [target(*OBJECTS), target(OBJECTS[0])]
    batch = torch.stack([image(seed=0), image(seed=1)])
    images, features = ImageList(batch, [HW, HW]), network.backbone(batch)
    torch.manual_seed(1)
    proposals, ours = network.rpn(images, features, targets)
    torch.manual_seed(1)
    their_proposals, theirs = RegionProposalNetwork.forward(network.rpn, images, features, targets)
    torch.testing.assert_close({name: loss.value for name, loss in ours.items()}, theirs)
    torch.testing.assert_close(proposals, their_proposals)


def test_losses_of_the_heads_agree_with_torchvision():
    network, targets = tiny_network(), [target(*OBJECTS), target(OBJECTS[0])]
    batch = torch.stack([image(seed=0), image(seed=1)])
    features = network.backbone(batch)
    proposals, _ = network.rpn(ImageList(batch, [HW, HW]), features, targets)
    torch.manual_seed(1)
    ours = network.roi_heads.losses(features, list(proposals), [HW, HW], targets, pseudo=False)
    torch.manual_seed(1)
    _, theirs = RoIHeads.forward(network.roi_heads, features, list(proposals), [HW, HW], targets)
    for name in ("loss_classifier", "loss_box_reg"):
        torch.testing.assert_close(ours[name].value, theirs[name])
    # masks are sampled half a pixel apart, see above
    assert ours["loss_mask"].value.item() == pytest.approx(theirs["loss_mask"].item(), rel=0.1)
