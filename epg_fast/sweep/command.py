"""The `sweep` command: rounds of drawing and judging, until the best setting is known."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from epg_fast.config import JudgeConfig, SweepConfig
from epg_fast.distributed import Ranks, joined, resumable
from epg_fast.evaluation.figures import difference, measured
from epg_fast.evaluation.judge import Judges, Rows, check_judges, open_judges
from epg_fast.evaluation.protocol import protocol
from epg_fast.files import as_json
from epg_fast.models import EPGViT
from epg_fast.plans import choose_together, parse_ops
from epg_fast.runtime import suitable_threads
from epg_fast.sampling import command as sampling
from epg_fast.sampling.engine import NotFinite, SamplingEngine
from epg_fast.sampling.outputs import cut_at_batches
from epg_fast.sweep.folder import SweepFolder
from epg_fast.sweep.grid import Setting, grid
from epg_fast.sweep.halving import FEW, Judged, cut, round_sizes
from epg_fast.sweep.report import ends, final_commands, write_report
from epg_fast.training.reconstruct import reconstruct_file, reconstructed_step
from epg_fast.wording import import_extra

log = logging.getLogger("epg_fast")

# Recording a graph takes longer than a batch; with so many of them it is a small part.
_RECORDED_BATCHES = 16


def run(config: SweepConfig) -> None:
    """Find the best setting of `config`'s grid; write sweep.json, sweep.md and plots to `config.outdir`.

    Images are judged batch by batch and not kept. Under torchrun the ranks share the batches, and then the figures. The
    same command goes on where one that was stopped or killed had come, with any batch size and number of ranks.
    Raises ValueError for what the user can mend, before anything is drawn; ImportError without matplotlib; OSError when
    the disk fails; `Interrupted` after a signal.
    """
    if not config.checkpoint or not config.outdir:
        raise ValueError("sweep: --checkpoint and --outdir are needed")
    if parse_ops(config.ops).base == "tune":
        raise ValueError(
            "ops: got tune, but sweep measures no plan; run `epg-fast tune --job sample` first, then sweep"
        )
    import_extra("matplotlib")  # after hours it would be too late
    with joined(config.device, "gloo", sampling.PATIENCE) as ranks:
        _Sweep(config, ranks).run()


def sweep_labels(config: SweepConfig, model: EPGViT) -> np.ndarray:
    """Labels [num] as `sample` has them, in an order of chance, so that the first ones are fair to all classes."""
    return np.random.default_rng(config.seed).permutation(sampling.labels_of(config, model))


class _Sweep:
    """One command's work. `state`: what sweep.json holds, the same on every rank; `base`: the engine of a setting."""

    def __init__(self, config: SweepConfig, ranks: Ranks):
        self.config, self.ranks = config, ranks
        self.grid = grid(config)
        self.folder = SweepFolder(config.outdir)
        self.base: SamplingEngine | None = None
        self.judges: Judges
        self.figure: str
        self.state: dict = {}
        self.clock: Counter[str] = Counter()
        self._counted, self._width, self._said = 0, None, False

    def run(self) -> None:
        config, ranks, folder = self.config, self.ranks, self.folder
        wanted = sampling.requested(config)
        ranks.decide(lambda: self._check(wanted))
        model = sampling.load_generator(config.checkpoint, ranks.device)
        self.labels = sweep_labels(config, model)
        self.base = self._engine(model, lambda case: choose_together(config.ops, case, ranks))
        self._leave_out_equal()
        base = self.base
        settings = wanted | {name: getattr(base, name) for name in sampling.GIVES_WAY}
        settings["weights_sha256"] = sampling.weights_sha256(model)
        settings["labels_sha256"] = hashlib.sha256(self.labels.astype("<i8").tobytes()).hexdigest()
        using = sampling.drawn_with(base, sampling.alike(settings, ranks))
        size = (model.image_size, model.image_size)
        del model
        with suitable_threads(base.model, base.chosen.threads), folder:
            del base
            self.state = ranks.decide(lambda: self._claim(settings, using))
            sampling.require_shared(folder, ranks)
            with resumable(folder.path):
                if "result" not in self.state:
                    self._search(size)
                if ranks.main:
                    self._finish()

    def _check(self, wanted: dict) -> None:
        """Raise ValueError for what cannot go on, before weights are read, which may take long."""
        folder = self.folder
        folder.require(wanted)
        check_judges(self.config, self.config.figure)
        begun, step = folder.begun, folder.read().get("step")
        for width in self._widths():
            if not (begun and folder.weights(width).exists()):
                reconstructed_step(self.config.checkpoint, width, step if begun else None)

    def _leave_out_equal(self) -> None:
        """Keep the first of settings that draw the same images: those whose intervals hold the same noise levels."""
        found: dict[tuple, tuple[Setting, int]] = {}
        for setting in self.grid:
            engine = self.base.with_settings(**_drawing(setting))  # raises for what cannot be drawn
            key = setting.sigma_rel, tuple(engine.calls), setting.guidance if engine.guided else 1.0
            found.setdefault(key, (setting, engine.evaluations))
        if len(found) < len(self.grid):
            left, total = len(self.grid) - len(found), len(self.grid)
            log.info("%d of %d settings guide at the same noise levels as others and are left out", left, total)
        if len(found) == 1:
            raise ValueError(
                "the grid has one setting, as no noise level lies in its guidance intervals; want two or more to "
                "compare: widen --interval, or take more --steps"
            )
        self.grid, self.evaluations = map(list, zip(*found.values(), strict=True))

    def _widths(self) -> list[float]:
        """Those that have to be made."""
        return list(dict.fromkeys(s.sigma_rel for s in self.grid if s.sigma_rel is not None))

    def _claim(self, settings: dict, using: dict) -> dict:
        """The state with which this command begins; the folder is locked."""
        folder, config = self.folder, self.config
        folder.lock()
        folder.require(settings)
        state = folder.read() if folder.begun else {}
        if not state:
            folder.forget()
            of_all = config.search == "grid" or len(self.grid) <= FEW
            sizes = [config.num] if of_all else round_sizes(config.num, config.first, config.batch_size)
            widths = self._widths()
            state = {
                "settings": settings,
                "drawn_with": [],
                "sizes": sizes,
                "step": reconstructed_step(config.checkpoint, widths[0]) if widths else None,
                "grid": [
                    as_json(dataclasses.asdict(setting)) | {"evaluations": evaluations}
                    for setting, evaluations in zip(self.grid, self.evaluations, strict=True)
                ],
                "rounds": [],
            }
        if using not in state["drawn_with"]:
            state["drawn_with"].append(using)
        folder.scan(_alive(state))
        if "result" not in state:
            folder.write("sweep.json", state)
        return state

    def _search(self, size: tuple[int, int]) -> None:
        config, ranks, folder = self.config, self.ranks, self.folder
        with self._time("judges"):
            cache = folder.path / "reference"
            self.judges = open_judges(config, size, ranks.device, cache, ranks, config.batch_size)
        self.figure = self.judges.decisive(config.figure, "figure")
        self._check_figure(size)
        with self._time("networks"):
            ranks.decide(self._make_weights)
        while "result" not in self.state:
            self._round()

    def _round(self) -> None:
        """Draw, judge and decide once."""
        ranks, alive, images = self.ranks, _alive(self.state), _next_size(self.state)
        log.info("round %d: %d settings, %d images of each", len(self.state["rounds"]) + 1, len(alive), images)
        missing = ranks.decide(
            lambda: {n: cut_at_batches(self.folder.parts[n].lacking(images), self.config.batch_size) for n in alive}
        )
        diverged = self._draw(missing, len(alive) * images)
        found = self._judge(sorted(set(alive) - set(diverged)), images)
        with self._time("files"):
            self.state = ranks.decide(lambda: self._decide(images, found, diverged))
        seconds = sum(ranks.gather(self.clock), Counter())
        total = sum(seconds.values())
        shares = ", ".join(f"{name} {100 * value / total:.1f}%" for name, value in seconds.most_common())
        log.info("%.0f s so far: %s", total / ranks.world_size, shares)

    def _check_figure(self, size: tuple[int, int]) -> None:
        """Raise ValueError when the first round has too few images to be judged, or for this figure."""
        judges, figure, images = self.judges, self.figure, self.state["sizes"][0]
        if images < judges.least:
            raise ValueError(
                f"the first round has {images} images of each setting, and the judges want at least {judges.least}; "
                "raise --first or --num"
            )
        # figures are computed when they are asked for: rows of the right number say which there are
        rows = judges.rows(torch.zeros(1, 3, *size, dtype=torch.uint8), torch.from_numpy(self.labels[:1]))
        if figure not in judges.figures({key: row.expand(images, *row.shape[1:]) for key, row in rows.items()}):
            raise ValueError(f"figure {figure}: the first round's {images} images are too few for it; raise --first")

    def _make_weights(self) -> None:
        for width in self._widths():
            path = self.folder.weights(width)
            if not path.exists():
                log.info("%s", reconstruct_file(self.config.checkpoint, path, width, self.state["step"]))

    # ---- drawing

    def _engine(self, model: EPGViT, ops: Callable) -> SamplingEngine:
        # what computes is chosen for the batch that guidance doubles, if there is any
        first = max(self.grid, key=lambda setting: (setting.guidance != 1, setting.steps))
        return SamplingEngine(model, ops=ops, **_drawing(first), **sampling.engine_options(self.config))

    def _engine_of(self, setting: Setting, batches: int) -> SamplingEngine:
        """The engine of a setting, of which so many batches are to be drawn; networks of one width at a time."""
        if setting.sigma_rel != self._width:
            chosen, self.base = self.base.chosen, None  # both networks need not fit
            path = self.config.checkpoint if setting.sigma_rel is None else self.folder.weights(setting.sigma_rel)
            self.base = self._engine(sampling.load_generator(str(path), self.ranks.device), lambda _: chosen)
            self._width = setting.sigma_rel
        engine = self.base.with_settings(**_drawing(setting))
        if engine.cuda_graphs and batches < _RECORDED_BATCHES:
            engine.cuda_graphs = False
            if not self._said:
                log.info("no CUDA graphs where a rank draws fewer than %d batches of a setting", _RECORDED_BATCHES)
            self._said = True
        return engine

    def _draw(self, missing: dict[int, list[range]], total: int) -> list[int]:
        """Draw and judge this rank's share of the images; returns the settings whose images are not finite."""
        ranks, folder = self.ranks, self.folder
        units = [(number, images) for number in sorted(missing) for images in missing[number]]
        done = total - sum(len(images) for _, images in units)
        mine = units[_share([self.evaluations[n] * len(images) for n, images in units], ranks.rank, ranks.world_size)]
        written, diverged = [], []
        with sampling.shared_bar("sweep", ranks, done, total, self._counted) as show:
            for number, group in itertools.groupby(mine, key=lambda unit: unit[0]):
                indices = np.concatenate([np.arange(images.start, images.stop) for _, images in group])
                try:
                    for drawn, rows, seconds in self._judged_batches(number, indices):
                        with self._time("files"):
                            written += [(number, images) for images in folder.save_runs(number, drawn, rows, seconds)]
                        show(len(drawn))
                except NotFinite as error:
                    log.warning("%s: %s; it is out", self.grid[number], error)
                    diverged.append(number)
            with self._time("waiting"):
                everyone = ranks.gather((written, diverged), while_waiting=show)
            show()
        self._counted = ranks.count(0)  # nobody draws again before all have judged
        if ranks.main:
            parts = [[(folder.parts[number], images) for number, images in theirs] for theirs, _ in everyone]
            sampling.count_written(ranks, parts)
        return sorted({number for _, numbers in everyone for number in numbers})

    def _judged_batches(self, number: int, indices: np.ndarray) -> Iterator[tuple[np.ndarray, Rows, float]]:
        """(numbers of the images, their rows, seconds of drawing) batch by batch. Raises NotFinite."""
        batch_size, device = self.config.batch_size, self.ranks.device
        with self._time("networks"):
            engine = self._engine_of(self.grid[number], math.ceil(len(indices) / batch_size))
        # a share of less than a batch would be compiled for a size of its own
        filled = np.pad(indices, (0, -len(indices) % batch_size if engine.fills_batches else 0), "edge")
        labels = sampling.labels_for(engine, self.labels[filled])
        stream = engine.stream(labels, filled, self.config.seed, as_uint8=True)
        started = time.perf_counter()
        for where, pixels in stream:
            drawn = indices[where]
            images = torch.from_numpy(pixels[: len(drawn)]).permute(0, 3, 1, 2).contiguous()
            judge = functools.partial(self.judges.rows, images, torch.from_numpy(self.labels[drawn]))
            rows, judging = _timed(device, judge)
            drawing = time.perf_counter() - started - judging
            self.clock["drawing"] += drawing
            self.clock["features"] += judging
            yield drawn, rows, drawing
            started = time.perf_counter()

    # ---- judging

    def _judge(self, numbers: list[int], images: int) -> dict[int, tuple]:
        """(Judged, what sweep.json says of it) of each setting. Every rank judges its share."""
        ranks = self.ranks
        if not numbers:
            raise ValueError("the images of all settings are not finite: the model or the sampler diverged")
        ranges = ranks.decide(lambda: {number: parts.ranges for number, parts in self.folder.parts.items()})
        found = {}
        with self._time("figures"):
            for number in numbers[ranks.rank :: ranks.world_size]:
                rows, seconds = self.folder.load(number, ranges[number], images)
                figures = self.judges.figures(rows)
                decisive = figures[self.figure]
                # the others cost more, and only those of many images are worth it
                worth = figures if images == self.state["sizes"][-1] else {self.figure: decisive}
                said = measured(worth) | {"seconds_per_image": seconds}
                found[number] = (Judged(decisive.value, decisive.spread, decisive.effects), said)
        with self._time("waiting"):
            return {number: item for share in ranks.gather(found) for number, item in share.items()}

    def _decide(self, images: int, found: dict[int, tuple], diverged: list[int]) -> dict:
        """The state with a further round, which sweep.json then holds; rows that no later round needs go."""
        judged, best = {number: item for number, (item, _) in found.items()}, self.judges.best[self.figure]
        this = {"images": images, **cut(judged, best, self.config.keep), "diverged": diverged, "results": {}}
        order = this["order"]
        for number in order:
            apart, spread = difference(judged[number], judged[order[0]], paired=True)
            this["results"][str(number)] = found[number][1] | {"difference": apart, "difference_spread": spread}
        state = self.state | {"figure": self.figure, "best": best, "protocol": self._protocol(images)}
        if images == state["sizes"][-1]:
            state["result"] = order[0]
            this |= {"kept": [], "kept_within_spread": [], "out_within_spread": []}
        elif out := this["out_within_spread"]:
            log.warning(
                "%d settings are out that the spread cannot tell from the last one that stays; see sweep.md", len(out)
            )
        state["rounds"] = [*self.state["rounds"], as_json(this)]
        self.folder.write("sweep.json", state)
        self.folder.drop(number for number in list(self.folder.parts) if number not in this["kept"])
        return state

    def _protocol(self, images: int) -> dict:
        judging = {f.name for f in dataclasses.fields(JudgeConfig)} | {"search", "first", "keep", "figure"}
        settings = {name: value for name, value in self.state["settings"].items() if name not in judging}
        drawn = settings | {"drawn_with": self.state["drawn_with"]}
        size = (self.base.model.image_size,) * 2
        return as_json(protocol(self.judges, self.config, drawn, images, size, self.ranks.device))

    def _finish(self) -> None:
        """Make table and plots, and print what comes next."""
        commands = final_commands(self.config, self.grid[self.state["result"]], self.folder)
        write_report(self.folder, self.state, commands)
        for end in ends(self.state):
            log.warning("the best lies at the end of its axis, %s: try values beyond it", end)
        print("\n".join(commands))

    @contextlib.contextmanager
    def _time(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.clock[name] += time.perf_counter() - started


def _drawing(setting: Setting) -> dict:
    """What an engine takes of a setting."""
    return {"steps": setting.steps, "guidance": setting.guidance, "interval": setting.interval}


def _alive(state: dict) -> list[int]:
    """The settings that are still drawn."""
    if not state["rounds"]:
        return list(range(len(state["grid"])))
    return sorted(state["rounds"][-1]["kept"])


def _next_size(state: dict) -> int:
    """Images per setting of the next round: the last one's at once, when few are left."""
    done = state["rounds"][-1]["images"] if state["rounds"] else 0
    return state["sizes"][-1] if len(_alive(state)) <= FEW else next(n for n in state["sizes"] if n > done)


def _share(costs: Sequence[float], rank: int, world_size: int) -> slice:
    """Which of the units, one behind the other, so that a rank meets few settings, are this rank's."""
    middles = np.cumsum(costs) - np.asarray(costs) / 2
    bounds = np.searchsorted(middles, np.sum(costs) * np.arange(world_size + 1) / world_size)
    return slice(int(bounds[rank]), int(bounds[rank + 1]))


def _timed(device: torch.device, function: Callable[[], dict]) -> tuple[dict, float]:
    """(what it returns, its seconds): on a GPU without those of the batch that is drawn before it."""
    if device.type != "cuda":
        started = time.perf_counter()
        return function(), time.perf_counter() - started
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    result = function()
    end.record()
    end.synchronize()
    return result, begin.elapsed_time(end) / 1000
