"""The server can die: killed with -9 at random moments of a run and started again, it continues
as if nothing had happened. The client never notices."""

from __future__ import annotations

import json
import random
import threading

import pytest

import tinkex
from tests.chaos import scenario
from tests.chaos.conftest import SERVER_KILLS
from tests.chaos.servers import RECORDED, SERVE, Server

#: Snapshots every few operations, so that restarts begin from them.
OFTEN = json.dumps({"snapshot_bytes": 4_000, "reap_seconds": 0.2})


#: Each test has its half of the kills. A few of them need not have a long run.
KILLS = -(-SERVER_KILLS // 2)
STEPS = scenario.FULL if KILLS > 4 else 20


class Killer:
    """Kills a server KILLS times, spread over the steps of a run, and starts it again."""

    def __init__(self, server, seed):
        self.server, self.kills = server, 0
        self._chance = random.Random(seed)
        self._steps = set(self._chance.sample(range(STEPS), KILLS))
        self._thread = None

    def on_step(self, step):
        if step in self._steps:
            self.join()  # of its last deed; the run continued meanwhile
            self._thread = threading.Thread(target=self._strike, name="killer")
            self._thread.start()

    def _strike(self):
        threading.Event().wait(self._chance.uniform(0.0, 0.6))
        self.server.kill()
        self.kills += 1
        self.server.start()

    def join(self):
        if self._thread is not None:
            self._thread.join()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    home = tmp_path_factory.mktemp("undisturbed") / "home"
    with Server(home) as server, tinkex.ServiceClient(server.url, "tml-any") as service:
        return scenario.run(service, home, STEPS)


@pytest.mark.parametrize(
    "snapshots",
    [pytest.param(False, id="journal", marks=pytest.mark.slow), pytest.param(True, id="snapshots")],
)
def test_a_run_goes_on_over_a_server_that_is_killed_again_and_again(
    tmp_path, undisturbed, snapshots, quick_retries, report
):
    """Models, moments, gradients, samplers and unfetched results come back; the final
    weights are the same; every checkpoint that was acknowledged loads. From the journal alone,
    and from snapshots with what came after them."""
    options = {"record": tmp_path / "record", "limits": OFTEN} if snapshots else {}
    server = Server(tmp_path / "home", RECORDED if snapshots else SERVE, **options)
    killer = Killer(server, seed=snapshots)

    with server, tinkex.ServiceClient(server.url, "tml-any") as service:
        outcome = scenario.run(service, server.home, STEPS, killer.on_step)
        killer.join()
        loaded = [
            service.create_training_client_from_state_with_optimizer(path)
            for path in outcome.checkpoints
        ]
        steps = [client.optim_step(tinkex.types.AdamParams()).result(60) for client in loaded]
    report(
        "server kills",
        operations=outcome.operations + outcome.samples,
        kills=killer.kills,
        checkpoints=len(steps),
        lost=sum(a != b for a, b in zip(undisturbed.results, outcome.results)),
        identical=outcome.weights == undisturbed.weights,
    )

    assert undisturbed.weights == outcome.weights
    assert undisturbed.results == outcome.results
    assert len(outcome.checkpoints) == len(steps)
    assert KILLS == killer.kills
