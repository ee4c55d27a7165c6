"""A trained muzero.py board game against random, perfect and MCTS players, from both seats, as JSON.

Run (from the repository root):  python benchmark/muzero_boards.py runs/tictactoe__muzero__1__<time> [--games 100]
Tic-tac-toe is also walked: every reply of the opponent to the agent's greedy moves, from both seats.
MCTS players need OpenSpiel (pip install open_spiel), the solver of connect four bitbully (pip install bitbully).
"""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import muzero


@dataclass
class Args:
    run: tyro.conf.Positional[str]
    """run folder"""
    games: int = 100
    """games against each player, half of them from either seat"""
    num_simulations: int | None = None
    """simulations of the agent's search, default as trained"""
    mcts: tuple[int, ...] = (100, 1_000)
    """simulations of the MCTS players"""


# === Tic-tac-toe, solved ===

LINES = [0b111, 0b111000, 0b111000000, 0b1001001, 0b10010010, 0b100100100, 0b100010001, 0b1010100]


@functools.cache
def solve(own: int, other: int) -> tuple[int, tuple[int, ...]]:
    """Value for the player to move, 1, 0 or -1, and all moves that reach it; stones are sets of 9 bits."""
    if any(other & line == line for line in LINES):
        return -1, ()
    values = {}
    for cell in range(9):
        if not (own | other) >> cell & 1:
            values[cell] = -solve(other, own | 1 << cell)[0]
    best = max(values.values(), default=0)
    return best, tuple(cell for cell, value in values.items() if value == best)


def bits(stones: torch.Tensor) -> int:
    return sum(1 << i for i in stones.nonzero()[:, 0].tolist())


def perfect_player(envs: muzero.BoardGame, games: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One of the best moves of tic-tac-toe, uniformly."""
    return np.array([rng.choice(solve(*map(bits, envs.stones[i]))[1]) for i in games], np.int64)


def walk(choose: Callable[[muzero.BoardGame], np.ndarray], seat: int) -> dict[str, int]:
    """Ends of all games of tic-tac-toe in which `choose` moves for one seat and the other tries everything.

    Positions that can be reached in several ways count once.
    """
    ends, stones = dict.fromkeys(("won", "drawn", "lost", "positions"), 0), torch.zeros(1, 2, 9)
    for move in range(9):
        game = muzero.BoardGame("tictactoe", len(stones))
        game.stones, game.moves[:] = stones, move
        mine = move % 2 == seat
        if mine:
            ends["positions"] += len(stones)
            actions = choose(game)
        else:
            which, actions = np.nonzero(game.legal)
            game = muzero.BoardGame("tictactoe", len(actions))
            game.stones, game.moves[:] = stones[which], move
        _, rewards, terminations, _, _ = game.step(actions)
        last = torch.unique(game.stones[torch.from_numpy(terminations & (rewards == 0))], dim=0)
        wins = torch.unique(game.stones[torch.from_numpy(rewards == 1)], dim=0)
        ends["drawn"] += len(last)
        ends["won" if mine else "lost"] += len(wins)
        stones = torch.unique(game.stones[torch.from_numpy(~terminations)], dim=0)
        if not len(stones):
            break
    return ends


# === Players from elsewhere ===


class MCTSPlayer:
    """OpenSpiel's MCTS with random rollouts."""

    def __init__(self, name: str, num_simulations: int):
        import pyspiel

        self.game = pyspiel.load_game({"tictactoe": "tic_tac_toe"}.get(name, name))
        evaluator = pyspiel.RandomRolloutEvaluator(1, 0)
        self.bot = pyspiel.MCTSBot(self.game, evaluator, 2.0, num_simulations, 1000, True, 0, False)
        self.states: dict[int, tuple] = {}  # of each game: the state and the move that this player has just made

    def __call__(self, envs: muzero.BoardGame, games: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        actions = []
        for i in games.tolist():
            state, pending = self.states.get(i, (None, None))
            if int(envs.moves[i]) < 2:
                state, pending = self.game.new_initial_state(), None
            if pending is not None:
                state.apply_action(pending)
            if state.move_number() < int(envs.moves[i]):  # what the agent has played since
                state.apply_action(self.new_move(envs, i, state))
            pending = self.bot.step(state)
            self.states[i] = state, pending
            actions.append(pending)
        return np.array(actions, np.int64)

    @staticmethod
    def new_move(envs: muzero.BoardGame, i: int, state) -> int:
        """The action whose stone is on the board and not yet in the state."""
        for action in state.legal_actions():
            game = muzero.BoardGame(envs.name, 1)
            game.reset()
            for past in [*state.history(), action]:
                game.step(np.array([past]))
            if torch.equal(game.stones[0], envs.stones[i]):
                return action
        raise AssertionError("a move is missing")


def kept_values(tracks: list[dict], seats: list[int]) -> tuple[int, int]:
    """Of the agent's moves in games of connect four, how many keep the game-theoretic value, and how many there are."""
    import bitbully

    solver, kept, total = bitbully.BitBully(), 0, 0
    for track, seat in zip(tracks, seats, strict=True):
        board = bitbully.Board()
        for move, action in enumerate(track["action"].tolist()):
            if move % 2 == seat:
                scores = solver.score_all_moves(board)
                kept += np.sign(scores[action]) == np.sign(max(scores.values()))
                total += 1
            board.play(action)
    return int(kept), total


def main(flags: Args) -> None:
    torch.set_num_threads(1)
    checkpoint = muzero.load_checkpoint(flags.run, muzero.Args())
    args = replace(muzero.Args(**checkpoint["args"]), cuda=False, eval_episodes=flags.games)
    if flags.num_simulations:
        args = replace(args, num_simulations=flags.num_simulations)
    device = torch.device("cpu")
    agent = muzero.make_agent(muzero.BoardGame(args.env_id, 1), args)
    agent.load_state_dict(checkpoint["parts"]["agent"])
    muzero.compile_search()
    result = {"run": flags.run, "step": checkpoint["global_step"], "num_simulations": args.num_simulations}

    players = {"random": muzero.random_player}
    if args.env_id == "tictactoe":
        players["perfect"] = perfect_player
    try:
        players |= {f"MCTS-{n}": MCTSPlayer(args.env_id, n) for n in flags.mcts}
    except ImportError:
        print("no MCTS players: pip install open_spiel", file=sys.stderr)
    for name, player in players.items():
        envs = muzero.BoardGame(args.env_id, min(flags.games, 100))
        returns, tracks = muzero.evaluate(agent, envs, args, device, lambda doing: False, opponent=player)
        result[name] = {"won": int((returns > 0).sum()), "drawn": int((returns == 0).sum()),
                        "lost": int((returns < 0).sum())}  # fmt: skip
        if args.env_id == "connect_four":
            try:
                seats = [i % 2 for i in range(len(tracks))]
                kept, total = kept_values(tracks, seats)
                result[name] |= {"moves_that_keep_the_value": kept, "moves": total}
            except ImportError:
                print("no solver: pip install bitbully", file=sys.stderr)
    if args.env_id == "tictactoe":

        def choose(game: muzero.BoardGame) -> np.ndarray:
            inputs = torch.from_numpy(game.observe()[0]), torch.from_numpy(game.legal), None, None
            return muzero.act(agent, *inputs, args).action.numpy()

        result["walk"] = {seat: walk(choose, i) for i, seat in enumerate(("first", "second"))}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
