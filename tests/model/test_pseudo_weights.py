"""What anchors and RoIs of pseudo-labelled images count: by hand, and through the whole network."""

import pytest
import torch

import model.network
from model.losses import total_loss
from model.pseudo_weights import pseudo_weights
from tests.model.examples import HW, ellipse, image, rectangle, target, tiny_network
from tests.model.test_losses import OBJECTS, objectness_gradients, watch

BOXES = torch.tensor([[8.0, 8, 30, 28], [24, 32, 60, 60], [40, 0, 60, 20], [0, 40, 20, 60]])
IS_OBJECT = torch.tensor([True, True, False, False])


def pseudo(**fields):
    return {**target(*OBJECTS, pseudo=True), **fields}


def test_by_equation_4_objects_count_and_background_does_not():
    weights = pseudo_weights(BOXES, IS_OBJECT, pseudo())
    assert weights[:, 0].tolist() == [1, 1, 0, 0]
    assert (weights[:, 1:] == 1).all()


def test_an_object_weighs_what_its_own_instance_does():
    triplets = torch.tensor([[0.7, 0.6, 0.5], [0.4, 0.3, 0.2]])
    weights = pseudo_weights(BOXES.flip(0), IS_OBJECT.flip(0), pseudo(weights=triplets))
    torch.testing.assert_close(weights[[3, 2]], triplets)
    assert weights[:2, 0].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("ignored", "counts"),
    [
        pytest.param([], True, id="none"),
        pytest.param([[40, 0, 60, 20]], False, id="the same box"),
        pytest.param([[40, 0, 60, 6.1]], False, id="IoU just above 0.3"),
        pytest.param([[40, 0, 60, 5.9]], True, id="IoU just below 0.3"),
        pytest.param([[20, 0, 51, 64]], False, id="half of it inside a large one"),
        pytest.param([[20, 0, 49, 64]], True, id="less than half inside a large one"),
        pytest.param([[60, 0, 64, 20]], True, id="side by side"),
        pytest.param([[0, 0, 5, 5], [40, 0, 60, 20]], False, id="the second of two"),
    ],
)
def test_background_counts_but_where_something_uncertain_lies(ignored, counts):
    weights = pseudo_weights(BOXES, IS_OBJECT, pseudo(ignored=torch.tensor(ignored).reshape(-1, 4)))
    assert weights[:, 0].tolist() == [1, 1, float(counts), 1]


def test_an_image_without_labels_has_background_only():
    nothing = {**target(pseudo=True), "weights": torch.zeros(0, 3), "ignored": BOXES[:1]}
    assert pseudo_weights(BOXES, torch.zeros(4, dtype=torch.bool), nothing)[:, 0].tolist() == [0, 1, 1, 1]


# --- through the network


def semi_losses(network, *targets):
    torch.manual_seed(1)
    return network([image(seed=i) for i in range(len(targets))], list(targets))


def test_weights_of_one_are_equation_4_to_the_bit():
    ones = torch.ones(len(OBJECTS), 3)
    for name, loss in semi_losses(tiny_network(), pseudo()).items():
        assert torch.equal(loss, semi_losses(tiny_network(), pseudo(weights=ones))[name]), name


@pytest.mark.parametrize(
    ("term", "names"),
    [
        (0, {"semi_loss_objectness", "semi_loss_classifier"}),
        (1, {"semi_loss_rpn_box_reg", "semi_loss_box_reg"}),
        (2, {"semi_loss_mask"}),
    ],
    ids=["c", "b", "m"],
)
def test_each_score_scales_its_own_losses(term, names):
    weights = torch.ones(len(OBJECTS), 3)
    weights[:, term] = 0.25
    plain, scaled = semi_losses(tiny_network(), pseudo()), semi_losses(tiny_network(), pseudo(weights=weights))
    for name, loss in plain.items():
        assert scaled[name].item() == pytest.approx(loss.item() * (0.25 if name in names else 1), rel=1e-5), name
        assert loss > 0


def test_background_anchors_and_rois_outside_ignored_boxes_have_a_gradient_and_those_on_them_have_none():
    network, ignored = tiny_network(), torch.tensor([[34.0, 2, 62, 30]])
    targets = [pseudo(ignored=ignored)]
    seen = watch(network)
    total_loss(network([image()], targets), beta=1, iou_weight=1).backward()
    gradients, labels = objectness_gradients(seen, network, targets)
    (anchors,) = seen["anchors"][0]
    on_ignored = pseudo_weights(anchors, labels == 1, targets[0])[:, 0] == 0
    assert (gradients[labels == 0] > 0).any()
    assert torch.equal(gradients[on_ignored], torch.zeros_like(gradients[on_ignored]))
    assert (on_ignored & (labels == 0)).any()
    rows = (seen["classes"][0].grad != 0).any(dim=1)
    assert seen["positive_rois"][0] < rows.sum() == len(rows)


def test_rois_on_ignored_boxes_count_by_equation_4_and_the_iou_branches_still_learn_nothing():
    network = tiny_network()
    seen = watch(network)
    rois = torch.tensor([[8.0, 8, 30, 28], [40, 0, 60, 20], [0, 40, 20, 60]])
    result = network.roi_heads.losses(
        network.backbone(image()[None]), [rois], [HW], [pseudo(ignored=rois[1:2])], pseudo=True
    )
    assert set(result) == {"loss_classifier", "loss_box_reg", "loss_mask"}
    sum(loss.value for loss in result.values()).backward()
    # The boxes of both objects are appended; the RoI on the ignored box, of five, is not looked at.
    assert (seen["classes"][0].grad != 0).any(dim=1).tolist() == [True] * 4
    assert result["loss_classifier"].samples == 5


@pytest.mark.parametrize(
    "targets",
    [
        pytest.param([pseudo(), pseudo()], id="eq. 4"),
        pytest.param([pseudo(ignored=torch.tensor([[34.0, 2, 62, 30]])), pseudo()], id="one with ignored boxes"),
        pytest.param([pseudo(weights=torch.tensor([[0.7, 0.6, 0.5], [0.0, 0.0, 0.2]])), pseudo()], id="soft weights"),
        pytest.param([target(pseudo=True), target(pseudo=True)], id="no objects"),
    ],
)
def test_leaving_out_what_weighs_nothing_changes_no_loss_and_no_gradient(targets, monkeypatch):
    def all_of_them(rois, targets):
        boxes, _, labels, _ = rois
        images = zip(boxes, [label > 0 for label in labels], targets, strict=True)
        return rois, torch.cat([pseudo_weights(*one) for one in images])

    results = []
    for way in (model.network._without_weightless, all_of_them):
        monkeypatch.setattr(model.network, "_without_weightless", way)
        network = tiny_network()
        seen = watch(network)
        losses = semi_losses(network, *targets)
        total_loss(losses, beta=1, iou_weight=1).backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        results.append((losses, gradients, len(seen["classes"][0])))
    (losses, gradients, looked_at), (losses_of_all, gradients_of_all, sampled) = results
    assert looked_at < sampled
    torch.testing.assert_close(losses, losses_of_all)
    torch.testing.assert_close(gradients, gradients_of_all, rtol=1e-4, atol=1e-6)


def test_images_that_the_network_resizes_have_their_ignored_boxes_resized():
    network = tiny_network()
    small = {**target((1, rectangle(2, 2, 20, 20, hw=(32, 32))), pseudo=True, hw=(32, 32)),
             "ignored": torch.tensor([[20.0, 0, 32, 16]])}  # fmt: skip
    seen = []
    network.rpn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[2][0]["ignored"].tolist()))
    network([image((32, 32))], [small])
    assert seen == [[[40.0, 0.0, 64.0, 32.0]]]


def test_only_the_images_of_a_batch_that_have_weights_are_weighed():
    network = tiny_network(frozen_batch_norm=True)
    second = {**target((1, ellipse(10, 10, 50, 50)), pseudo=True), "weights": torch.zeros(1, 3)}
    alone = semi_losses(network, pseudo())
    both = semi_losses(network, pseudo(), second)
    # sampled separately, normalised together: half of what the first image has alone, nothing of the second
    assert both["semi_loss_mask"] > 0
    assert set(both) == set(alone)
    gone = semi_losses(network, pseudo(weights=torch.zeros(2, 3)), second)
    assert all(loss == 0 for loss in gone.values())
