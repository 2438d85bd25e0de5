"""Runs of the benchmark that were never run."""

import json

from scripts.benchmark_lines import parse_line


def made_run(line, seed, heights, images=(10, 20, 30), instances=2, precision=None, **settings):
    """What a run with these values of mAP@0.5 would leave."""
    reliability = {"spearman": 0.5, "calibration_error": 0.1, "bins": [[0.55, 0.5, 6], [0.9, 0.8, 3]], "count": 9}
    shared = {"data": "made up", "pool_images": 100, "pool_instances": 300, "test_images": 2, "profile": "p",
              "pool": "digest", "test": "digest",
              "weights": "none", "first_batch": 10, "batch": 10, "cycles": 3, "network": {"min_size": 64},
              "training": {"epochs": 1, "min_steps": 2, "batch_size": 3}}  # fmt: skip
    name = parse_line(line, seed)
    clocks = {"cpu": 3.0 if name.semi_supervised else 2.0, "wall": 4.0}
    cycles = [
        {"number": n, "annotated_images": count, "annotated_instances": instances * count,
         "annotated_vertices": 10 * count, "new_images": 10, "new_empty_images": n, "annotated": [f"{seed}-{n}"],
         "pseudo_images": 4 if name.semi_supervised and n > 1 else 0,
         "pseudo_quality": {"instances": 5, "precision": precision, "recall": 0.2} if n > 1 and precision else None,
         "seconds": {"training": clocks, "evaluation": clocks, **({"scoring": clocks} if n < len(heights) else {})},
         "map_50": height, "map_50_95": height / 2, "ap_50_by_class": {"a": height, "b": None},
         "rescored_map_50": height, "rescored_map_50_95": height / 2 + 0.01,
         "box_reliability": reliability, "mask_reliability": {**reliability, "bins": []}, "matches": None}
        for n, (count, height) in enumerate(zip(images, heights, strict=False), start=1)
    ]  # fmt: skip
    return {
        "strategy": name.strategy,
        "semi_supervised": name.semi_supervised,
        "options": dict(name.options),
        "line": line,
        "seed": seed,
        "settings": {**shared, **settings},
        "test_instances": {"a": [1, 1], "b": [0, 0]},
        "cycles": cycles,
    }


def write_runs(folder, *runs):
    for state in runs:
        path = folder / f"{state['line']}-seed{state['seed']}" / "run.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(state))
