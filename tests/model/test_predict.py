import threading

import numpy as np
import pytest
import torch

from model.dataset import image_tensor
from model.errors import InvalidInputError
from model.predict import ahead, detect, rescored
from tests.model.examples import tiny_network


def pixels(hw, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (*hw, 3), dtype=np.uint8)


def test_an_image_of_the_input_size_gives_what_the_network_gives_the_best_class_score_first():
    network = tiny_network().eval()
    picture = pixels((64, 64))
    with torch.inference_mode():
        (raw,) = network([image_tensor(picture, (64, 64))])
    (found,) = detect(network, [picture])
    assert len(found) > 0
    assert found.class_scores.tolist() == sorted(raw["scores"].tolist(), reverse=True)
    order = torch.argsort(raw["scores"], descending=True, stable=True)
    for name, ours in (("boxes", found.boxes_xyxy), ("labels", found.labels), ("roi_masks", found.roi_masks),
                       ("box_scores", found.box_scores), ("mask_scores", found.mask_scores)):  # fmt: skip
        assert np.array_equal(ours, raw[name][order].numpy()), name


@pytest.mark.parametrize("hw", [(128, 128), (32, 32), (200, 60), (40, 400)], ids=str)
def test_boxes_are_in_pixels_of_the_image_itself(hw):
    (found,) = detect(tiny_network(), [pixels(hw)])
    assert found.image_hw == hw
    assert len(found) > 0
    assert (found.boxes_xyxy >= 0).all()
    assert (found.boxes_xyxy <= np.array([hw[1], hw[0]] * 2) + 1e-3).all()
    assert found.boxes_xyxy[:, 2].max() > 0.5 * hw[1]
    assert found.boxes_xyxy[:, 3].max() > 0.5 * hw[0]


def test_an_enlarged_picture_has_the_same_detections_in_larger_pixels():
    network, small = tiny_network(), pixels((64, 64))
    (found,) = detect(network, [small])
    (larger,) = detect(network, [small.repeat(3, axis=0).repeat(3, axis=1)])
    assert np.allclose(larger.boxes_xyxy, 3 * found.boxes_xyxy, atol=0.1)
    assert np.allclose(larger.class_scores, found.class_scores, atol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_images_of_all_sizes_come_back_in_order_whatever_the_batch_size(batch_size):
    sizes = [(64, 64), (50, 90), (80, 64)]
    found = list(detect(tiny_network(), (pixels(hw) for hw in sizes), batch_size=batch_size))
    assert [detections.image_hw for detections in found] == sizes


def test_no_more_images_than_a_batch_are_taken_at_a_time():
    taken = []

    def source():
        for number in range(6):
            taken.append(number)
            yield pixels((64, 64))

    results = detect(tiny_network(), source(), batch_size=2)
    assert taken == []
    next(results)
    assert taken == [0, 1]
    next(results)
    next(results)
    assert taken == [0, 1, 2, 3]


def test_an_image_without_detections_gives_none():
    (found,) = detect(tiny_network(score_threshold=1.0), [pixels((40, 90))])
    assert (len(found), found.image_hw, found.roi_masks.shape) == (0, (40, 90), (0, 28, 28))
    assert list(detect(tiny_network(), [])) == []


@pytest.mark.parametrize(
    "picture",
    [
        pytest.param(np.zeros((8, 8), dtype=np.uint8), id="grey"),
        pytest.param(np.zeros((8, 8, 4), dtype=np.uint8), id="four channels"),
        pytest.param(np.zeros((8, 8, 3), dtype=np.float32), id="floats"),
        pytest.param(np.zeros((0, 8, 3), dtype=np.uint8), id="no rows"),
    ],
)
def test_pixels_of_another_form_are_refused(picture):
    with pytest.raises(InvalidInputError, match="expected an RGB image"):
        list(detect(tiny_network(), [picture]))


def test_items_are_made_ahead_in_order_by_one_other_thread():
    made, threads = [], set()

    def source():
        for number in range(20):
            made.append(number)
            threads.add(threading.current_thread())
            yield number

    most = 0
    for number in ahead(source(), held=2):
        most = max(most, len(made) - number - 1)
        assert number == len(made) - 1 or made[number] == number
    assert made == list(range(20))
    assert most <= 2 + 1  # two that wait, and none beyond the one that is being made
    assert len(threads) == 1
    assert threads != {threading.current_thread()}


def test_what_making_an_item_raises_comes_in_its_place():
    def source():
        yield 1
        raise InvalidInputError("no more")

    items = ahead(source())
    assert next(items) == 1
    with pytest.raises(InvalidInputError, match="no more"):
        next(items)


def test_who_stops_early_leaves_no_thread_behind():
    before = threading.active_count()
    items = ahead(iter(range(10**9)))
    assert next(items) == 0
    items.close()
    assert threading.active_count() == before


def test_torch_keeps_to_its_threads_ahead():
    threads = torch.get_num_threads()
    assert list(ahead(torch.get_num_threads() for _ in range(2))) == [threads, threads]


def test_rescored_detections_have_c_times_m_and_the_best_first():
    (found,) = detect(tiny_network(), [pixels((64, 64))])
    ranked, halved = rescored(found), rescored(found, lambda mask_scores: mask_scores / 2)
    products = found.class_scores * found.mask_scores
    order = np.argsort(-products, kind="stable")
    assert order.tolist() != list(range(len(found)))
    for calibrated, expected in ((ranked, products), (halved, products / 2)):
        np.testing.assert_allclose(calibrated.class_scores, expected[order], rtol=1e-6)
        np.testing.assert_array_equal(calibrated.mask_scores, found.mask_scores[order])
        np.testing.assert_array_equal(calibrated.boxes_xyxy, found.boxes_xyxy[order])
