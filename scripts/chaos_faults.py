"""What goes wrong on the connections of a chaos run, drawn at random."""

import json
import random
from collections.abc import Callable

from scripts.fault_proxy import Call, Fault


class Faults:
    """Draws what happens to a request; nothing while `active` is off."""

    def __init__(self, rng: random.Random) -> None:
        self.active = False
        self.watch: Callable[[Call], None] | None = None
        self._rng = rng
        self._api_was_spared = True  # so far

    def look(self, call: Call) -> None:
        """At a request to Label Studio, before anything is done to it."""
        if self.watch is not None:
            self.watch(call)

    def of_webhook(self, call: Call) -> Fault | None:
        """On the way from Label Studio to the web process; what is asked, /health and /setup, is left alone."""
        if not self.active or not call.path.startswith("/webhook") or self._rng.random() > 0.4:
            return None
        choices = [
            Fault(kind="drop"),
            Fault(kind="double"),
            Fault(kind="late", seconds=self._rng.uniform(0.5, 8)),
            Fault(kind="slow", seconds=self._rng.uniform(0.2, 1.5)),
            Fault(kind="refuse"),
            Fault(kind="lose_answer"),
        ]
        return self._rng.choice(choices)

    def of_api(self, call: Call) -> Fault | None:
        """On the way from our processes to Label Studio; imports of predictions suffer most, and the first request
        always, so that the shortest run has a fault."""
        chance = 0.35 if "/import/predictions" in call.path else 0.04
        if not self.active or (self._rng.random() > chance and not self._api_was_spared):
            return None
        self._api_was_spared = False
        choices = {
            Fault(kind="status", status=500): 4,
            Fault(kind="status", status=503): 3,
            Fault(kind="status", status=429): 4,
            Fault(kind="status", status=401): 0.4,  # waited for, as a token that is taken is
            Fault(kind="status_after", status=502): 3,
            Fault(kind="slow", seconds=self._rng.uniform(0.3, 3)): 4,
            Fault(kind="cut"): 4,
            Fault(kind="lose_answer"): 3,
            Fault(kind="refuse"): 3,
        }
        return self._rng.choices(list(choices), list(choices.values()))[0]


def noise() -> list[tuple[str, bytes, int]]:
    """Webhooks that nobody should send: names, bodies and the expected answers."""
    another = {"action": "ANNOTATION_CREATED", "project": {"id": 90001, "created_at": "2020-01-01T00:00:00Z"}}
    return [
        ("no JSON", b"{broken", 422),
        ("no project", b'{"action": "ANNOTATION_CREATED"}', 422),
        ("a strange action", b'{"action": "x; drop table", "project": {"id": 1}}', 422),
        ("a project without id", b'{"action": "ANNOTATION_CREATED", "project": {"created_at": "2020"}}', 422),
        ("a list", b"[]", 422),
        ("another project", json.dumps(another).encode(), 200),
    ]
