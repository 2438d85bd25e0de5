"""Files that several processes share."""

import threading
import time

import cv2
import numpy as np

from scripts.shared_files import locked, write_png


def test_who_does_not_wait_learns_that_a_lock_is_held(tmp_path):
    path = tmp_path / "lock"
    with locked(path, wait=False) as first, locked(path, wait=False) as second:
        assert (first, second) == (True, False)
    with locked(path, wait=False) as again:
        assert again


def test_who_waits_goes_on_when_the_lock_is_free(tmp_path):
    path, order = tmp_path / "lock", []

    def wait():
        with locked(path, on_wait=lambda: order.append(("waits", True))) as held:
            order.append(("waited", held))

    thread = threading.Thread(target=wait)
    with locked(path):
        thread.start()
        while not order:
            time.sleep(0.01)
        order.append(("first", True))
    thread.join(timeout=10)
    assert order == [("waits", True), ("first", True), ("waited", True)]
    with locked(path, on_wait=lambda: order.append(("waits", True))):
        assert len(order) == 3


def test_a_picture_is_written_in_its_colours(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "a.png", pixels)
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / "a.png"))[:, :, ::-1], pixels)
