"""Long random histories, faster than hypothesis reaches them: python -m tests.core.walk FIRST_SEED LAST_SEED

Exits with 1 at the first law that is broken, and prints how to get there again. Also run, by test_mutants.py, with
a broken core: prints where the core it tested lies.
"""

from __future__ import annotations

import random
import sys
import traceback
from collections import Counter

import fl_server.core
from fl_server.core.model import SessionConfig
from tests.core.world import CLIENTS, OPS, World

History = list[tuple[str, int, int]]

LENGTH = 120


def some_config(rng: random.Random) -> SessionConfig:
    """Small timeouts of several proportions: which of two comes first decides much."""
    return SessionConfig(
        rounds=rng.choice((1, 2, 3)),
        min_clients=rng.choice((1, 2, 3)),
        requested_clients=rng.choice((0, 3, 4)),
        buffer_size=rng.choice((-1, -1, 1, 2, 9)),
        validate=rng.choice((True, False)),
        client_ids=rng.choice((None, None, frozenset(CLIENTS[:4]))),
        round_timeout_s=20.0,
        validation_timeout_s=rng.choice((15.0, 150.0)),
        selection_timeout_s=rng.choice((10.0, 80.0)),
        rejoin_window_s=rng.choice((0.0, 30.0, 60.0)),
        round_retries=rng.choice((0, 1, 2)),
        retry_wait_s=rng.choice((0.0, 5.0)),
    )


def some_history(rng: random.Random, length: int = LENGTH) -> History:
    return [(rng.choice(OPS), rng.randrange(60), rng.randrange(60)) for _ in range(length)]


def begin(world: World) -> None:
    world.do("everybody", 0, 0)
    world.do("start", 2, 0)


def end(world: World) -> None:
    """What may be asked at any time is asked of everything."""
    world.check_every_verdict_again()
    world.check_replay()


def live(world: World, history: History) -> World:
    begin(world)
    for op, a, b in history:
        world.do(op, a, b)
    end(world)
    return world


def walk(seed: int) -> World:
    rng = random.Random(seed)
    return live(World(some_config(rng)), some_history(rng))


def live_together(configs: tuple[SessionConfig, SessionConfig], histories: tuple[History, History], seed: int) -> None:
    """Two sessions at once, their events mixed: each does what it does alone."""
    alone = [live(World(config), history) for config, history in zip(configs, histories, strict=True)]
    together = [World(config) for config in configs]
    for world in together:
        begin(world)
    turns = [0] * len(histories[0]) + [1] * len(histories[1])
    random.Random(seed).shuffle(turns)
    ahead = [iter(history) for history in histories]
    for turn in turns:
        together[turn].do(*next(ahead[turn]))
    for world, same in zip(together, alone, strict=True):
        end(world)
        assert world.story == same.story, "two sessions at once: the other changed what this one does"
        assert world.session == same.session, "two sessions at once: the other changed this one's state"


def walk_two(seed: int) -> None:
    rng = random.Random(seed)
    live_together((some_config(rng), some_config(rng)), (some_history(rng), some_history(rng)), seed)


def main(first: int, last: int) -> int:
    print("core:", fl_server.core.__file__)
    reached: Counter[str] = Counter()
    for seed in range(first, last):
        try:
            world = walk(seed)
            if seed % 10 == 0:
                walk_two(seed)
        except Exception as broken:
            print(f"seed {seed}: {type(broken).__name__}: {broken}")
            traceback.print_exception(broken, limit=-4)
            return 1
        reached += Counter(committed=len(world.ledger.committed), lost=len(world.ledger.lost), events=len(world.story))
        reached[world.session.record.status] += 1
    print(dict(reached))
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2])))
