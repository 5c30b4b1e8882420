import random

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from prunecast.compression.versions import rounded_floats
from prunecast.server.federation import FederationError
from support.federation import initial_arrays, to_arrays, to_record


@pytest.mark.parametrize("policy", ["balanced", "small", "lossless"])
def test_a_drawn_start_makes_the_first_keyframe_small(federation, policy):
    grid, _, seen = federation(policy)
    start = grid.draw_initial(to_record(initial_arrays()), seed=7)
    random.seed(0)
    FedAvg().start(grid=grid, initial_arrays=start, num_rounds=2)
    first = [arrays for _, kind, arrays in seen if kind == "train"][:3]
    for arrays in first:
        for name, array in to_arrays(start).items():
            assert arrays[name].tobytes() == array.tobytes()
    kinds = [e for e in grid.ledger.entries if e.direction == "down" and e.round == 1]
    assert kinds[0].kind == "keyframe"
    if policy != "lossless":
        assert kinds[0].payload_bytes < 2000
        assert not np.array_equal(first[0]["fc.weight"], initial_arrays()["fc.weight"])
    with pytest.raises(FederationError, match="before the first"):
        grid.draw_initial(start, seed=8)


def test_a_drawn_start_with_statistics_keeps_its_seed_and_their_published_bits(federation):
    grid, _, seen = federation("balanced", nodes=1)
    given = initial_arrays()
    given["bn.running_var"] = np.linspace(0.3, 3, 16, dtype=np.float32)  # of a model that was used
    start = grid.draw_initial(to_record(given), seed=7)
    drawn = to_arrays(start)["bn.running_var"]
    assert drawn.tobytes() == rounded_floats(given["bn.running_var"], 6).tobytes()
    FedAvg(min_train_nodes=1, min_available_nodes=1, fraction_evaluate=0.0).start(
        grid=grid, initial_arrays=start, num_rounds=1
    )
    assert seen[0][2]["bn.running_var"].tobytes() == drawn.tobytes()
    (first,) = (e for e in grid.ledger.entries if e.direction == "down")
    assert first.kind == "keyframe"
    assert first.payload_bytes < 700  # 4,256 weights from a seed
