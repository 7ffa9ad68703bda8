"""Cascades: a cheap model answers what it is sure of, and passes the other images on to a dearer one."""
import json
import logging
import os
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.data import resolve_data_config

from pst_timm.checkpoints import label_names, preprocessing, rules, set_attention
from pst_timm.checkpoints.schema import MOST_JSON, check_budget, check_facts, parse_json
from pst_timm.checkpoints.trust import check_ordinary
from pst_timm.metrics.base import Metric
from pst_timm.metrics.binomial import binomial_tail, binomial_upper
from pst_timm.metrics.calibration import calibration_error
from pst_timm.metrics.failure import failure_auroc
from pst_timm.models import reparameterize
from pst_timm.utils.cost import check_image_memory
from pst_timm.utils.errors import PSTError
from pst_timm.utils.markdown import plain

from .runtime import open_source

__all__ = [
    'COSTS', 'MOST_STAGES', 'Cascade', 'CascadeClassifier', 'CascadeOutput', 'Stage', 'confidence_of', 'open_stage',
    'read_cascade', 'resolve_stage', 'write_cascade',
]

_logger = logging.getLogger(__name__)

FORMAT = 'pst_timm cascade'
SUFFIX = '.json'
MOST_STAGES = 3
COSTS = {'latency': 'ms', 'macs': 'GMACs'}  # what a cost is, and its unit
TEMPERATURES = (1e-3, 1e3)

# when a cascade says that it sends more images on than it did when it was fitted
FIRST_LOOK = 64  # images; then whenever they are twice as many
FALSE_ALARM = 1e-4  # chance of one at each look, if nothing has moved
FITTED_LEVEL = 1e-3  # of the bound of what was passed on when it was fitted

STAGE = {
    'source': rules.text(1000),
    'img_size': rules.each(rules.whole(1, rules.MOST_PIXELS), 2, 2),
    'topk': rules.whole(0, rules.MOST_PIXELS ** 2),
    'fine_fusion': rules.choice('gate', 'joint'),
    'reparam': rules.flag,
    'temperature': rules.real(*TEMPERATURES),
    'threshold': rules.real(0, 1),
    'cost': rules.real(1e-9, 1e12),
    'reached': rules.whole(0, 10 ** 12),
    'passed': rules.whole(0, 10 ** 12),
}
NEEDED = ('source', 'img_size', 'temperature', 'threshold', 'cost', 'reached', 'passed')
CASCADE = {
    'format': rules.choice(FORMAT),
    'version': rules.whole(1, 1),
    'cost': rules.choice(*COSTS),
    'num_classes': rules.whole(1, rules.MOST_CLASSES),
    'class_names': rules.names,
    'stages': rules.each(rules.mapping(STAGE), 2, MOST_STAGES),
    'fit': rules.mapping({}, rules.plain),
}


class CascadeOutput(NamedTuple):
    """What a cascade gives for B images."""
    logits: torch.Tensor
    """float32 (B, classes): those of the stage that answered, over its temperature, so that softmax is calibrated."""
    stage: torch.Tensor
    """int64 (B,): the stage that answered, from 0."""
    cost: torch.Tensor
    """float32 (B,): what all stages cost that saw the image, as measured when the cascade was fitted."""


def confidence_of(logits: torch.Tensor) -> torch.Tensor:
    """The largest probability (B,) of logits (B, classes), in double precision, on the CPU."""
    return logits.detach().float().cpu().double().softmax(dim=-1).amax(dim=-1)


class Stage(nn.Module):
    """A model of a cascade: images of the cascade's size and preprocessing to logits at a temperature."""

    def __init__(
            self,
            model: nn.Module,
            source: str,
            config: Dict[str, Any],
            settings: Optional[Dict[str, Any]] = None,
            temperature: float = 1.,
            threshold: float = 0.,
            cost: float = 1.,
            reached: int = 0,
            passed: int = 0,
    ):
        """
        Args:
            model: The model.
            source: Where it came from, for messages.
            config: How it takes images, from `preprocessing`.
            settings: What of `topk`, `fine_fusion` and `reparam` it was opened with.
            temperature: What its logits are divided by.
            threshold: It answers what it is more confident of than that, from 0 (answers all) to 1 (passes all on).
            cost: Of an image.
            reached: Images that it saw when the cascade was fitted.
            passed: How many of these it passed on.
        """
        super().__init__()
        self.model = model
        self.source = source
        self.config = config
        self.settings = dict(settings or {})
        self.temperature = temperature
        self.threshold = threshold
        self.cost = cost
        self.reached = reached
        self.passed = passed
        self.input_size = tuple(config['input_size'])
        self.name = str(model.pretrained_cfg.get('architecture') or type(model).__name__)
        for key in ('scale', 'shift'):
            self.register_buffer(key, None, persistent=False)

    def take(self, config: Dict[str, Any]) -> None:
        """Take images that are prepared as another configuration says: normalised by another mean, or deviation."""
        own, other = ([torch.tensor(c[k]).view(1, -1, 1, 1) for k in ('mean', 'std')] for c in (self.config, config))
        if all(torch.equal(a, b) for a, b in zip(own, other)):
            return
        self.scale, self.shift = other[1] / own[1], (other[0] - own[0]) / own[1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] != self.input_size[-2:]:
            small = F.interpolate(x.float(), self.input_size[-2:], mode='bilinear', antialias=True)
            x = small.to(x.dtype)
        if self.scale is not None:
            x = x * self.scale + self.shift
        logits = self.model(x)
        logits = logits[0] if isinstance(logits, (tuple, list)) else logits
        return logits.float() / self.temperature


def open_stage(
        source: os.PathLike,
        img_size: Optional[Sequence[int]] = None,
        topk: Optional[int] = None,
        fine_fusion: Optional[str] = None,
        tell: bool = True,
) -> Stage:
    """Open a model as a stage, with no temperature and no threshold yet.

    Args:
        source: What `open_source` takes, but for cascades.
        img_size: Height and width, the model's own if None.
        topk: Coarse tokens that fine attention selects per head; None for the model's own.
        fine_fusion: 'gate' or 'joint', likewise.
        tell: Whether to say where the size is another one than that of the model.

    Raises:
        PSTError: If it cannot be opened, is no classifier, or cannot be set as asked.
    """
    told = plain(source, 300)
    if Path(source).suffix == SUFFIX:
        raise PSTError(f'{told} cannot be a stage: it is a cascade itself, or no model. Name single models.')
    model = open_source(source)
    if model.num_classes == 0:
        raise PSTError(f'{told} has no classifier: name one that has.')
    settings = {key: value for key, value in (('topk', topk), ('fine_fusion', fine_fusion)) if value is not None}
    set_attention(model, topk, fine_fusion, told)
    if not hasattr(model, 'set_topk'):
        settings = {}
    size = {}
    if img_size is not None:
        check_image_memory(max(img_size))
        size = {'input_size': (model.pretrained_cfg['input_size'][0], *img_size)}
    config = preprocessing(model, told, size) if tell else resolve_data_config(size, model=model)
    return Stage(model.eval(), str(source), config, settings)


class Cascade(nn.Module):
    """Two or three models in order of their cost; each answers what it is sure of, and passes the others on.

    Images come at the size of the largest stage, prepared as its `preprocessing` says; stages of a smaller size resize
    them (bilinear, antialiased). A cascade that sends far more images on than when it was fitted warns, once.
    """

    def __init__(
            self,
            stages: Sequence[Stage],
            cost: str = 'latency',
            class_names: Optional[Sequence[str]] = None,
            facts: Optional[Dict[str, Any]] = None,
    ):
        """
        Args:
            stages: The stages, the cheapest first.
            cost: What their costs are, one of `COSTS`.
            class_names: Names of the classes, in order; those that the stages know if None.
            facts: What is known of how it was fitted.

        Raises:
            PSTError: If the stages know other classes, or take images of other channels.
        """
        super().__init__()
        if not 2 <= len(stages) <= MOST_STAGES:
            raise PSTError(f'A cascade has two or three stages, got {len(stages)}.')
        _check_alike(stages)
        self.stages = nn.ModuleList(stages)
        self.cost = cost
        self.facts = dict(facts or {})
        largest = max(stages, key=lambda stage: (stage.input_size[1] * stage.input_size[2], stage is stages[-1]))
        self.config = dict(largest.config)
        self.input_size = largest.input_size
        for stage in stages:
            stage.take(self.config)
        self.num_classes = stages[0].model.num_classes
        known = next(filter(None, (label_names(stage.model) for stage in stages)), [])
        self.class_names = list(class_names or known)
        self.watch = Watch(stages)
        self.eval()

    @classmethod
    def from_file(cls, path: os.PathLike, stages: Optional[Sequence[os.PathLike]] = None) -> 'Cascade':
        """Open a cascade that `pst-timm cascade fit` wrote.

        Args:
            path: The JSON file. It may be a stranger's: it can name files and folders beside it or below, no others.
            stages: What to take for the stages instead, wherever it is: the same models.

        Raises:
            PSTError: If it is not such a file, or a stage cannot be opened, or is none of this cascade.
        """
        path = Path(path)
        value = read_cascade(path)
        told = value['stages']
        if stages is not None and len(stages) != len(told):
            raise PSTError(f'{path} has {len(told)} stages, and {len(stages)} are named: name one for each.')
        sources = [resolve_stage(path, entry['source']) for entry in told] if stages is None else stages
        opened = []
        for source, entry in zip(sources, told):
            stage = open_stage(source, entry['img_size'], entry.get('topk'), entry.get('fine_fusion'), tell=False)
            for key in ('temperature', 'threshold', 'cost', 'reached', 'passed'):
                setattr(stage, key, entry[key])
            opened.append(stage)
        names = value.get('class_names') or []
        for stage in opened:
            known = label_names(stage.model)
            if stage.model.num_classes != value['num_classes'] or (known and names and known != names):
                raise PSTError(
                    f'{path} was fitted for {value["num_classes"]} classes, and its stage {plain(stage.source, 300)} '
                    f'has {stage.model.num_classes}{" of other names" if known and known != names else ""}: put back '
                    f'the model it was fitted with, or fit it again.')
        cascade = cls(opened, value['cost'], names, value.get('fit'))
        cascade.fold([entry.get('reparam', False) for entry in told])
        cascade.check_runs()
        return cascade

    @property
    def unit(self) -> str:
        """What a cost is counted in."""
        return COSTS[self.cost]

    def fold(self, which: Sequence[bool]) -> None:
        """Fold some of the stages for inference."""
        for stage, wanted in zip(self.stages, which):
            if wanted:
                try:
                    stage.model = reparameterize(stage.model, inplace=True)
                except ValueError as e:
                    raise PSTError(f'{plain(stage.source, 300)} cannot be folded: {e}') from e
                stage.settings['reparam'] = True

    @torch.no_grad()
    def check_runs(self) -> None:
        """Make sure, on an image without content, that each stage gives scores of the classes.

        Raises:
            PSTError: If one does not.
        """
        x = torch.zeros(1, *self.input_size)
        for stage in self.stages:
            told = f'{plain(stage.source, 300)} does not take images of {"x".join(map(str, stage.input_size))}'
            try:
                shape = tuple(stage(x).shape)
            except Exception as e:
                reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
                raise PSTError(f'{told} ({reason.rstrip(".")[:300]}): choose another size.') from e
            if shape != (1, self.num_classes):
                raise PSTError(f'{told} as a classifier: it gives {shape} for one, not (1, {self.num_classes}).')

    def forward(self, images: torch.Tensor) -> CascadeOutput:
        """Images (B, C, H, W) of the cascade's size to logits, stages and costs."""
        output, counts = self.route(images)
        self.watch.add(counts)
        self.watch.look()
        return output

    @torch.no_grad()
    def route(self, images: torch.Tensor) -> Tuple[CascadeOutput, List[Tuple[int, int]]]:
        """The same without a word on how many are passed on; and how many each stage but the last saw and passed on.

        Raises:
            ValueError: If the images have another size.
        """
        if images.ndim != 4 or tuple(images.shape[1:]) != self.input_size:
            raise ValueError(
                f'The cascade takes images (B, {", ".join(map(str, self.input_size))}), got {tuple(images.shape)}.')
        device = images.device
        rest = torch.arange(len(images), device=device)
        stage_of = torch.zeros(len(images), dtype=torch.long, device=device)
        cost = torch.zeros(len(images), device=device)
        logits, counts = None, []
        for i, stage in enumerate(self.stages):
            found = stage(images if len(rest) == len(images) else images[rest])
            if logits is None:
                logits = found
            else:
                logits[rest], stage_of[rest] = found, i
            cost[rest] += stage.cost
            if i == len(self.stages) - 1:
                break
            unsure = ~(confidence_of(found) > stage.threshold).to(device)  # of NaN nothing is sure
            counts.append((len(rest), int(unsure.sum())))
            rest = rest[unsure]
            if not len(rest):
                break
        return CascadeOutput(logits, stage_of, cost), counts


class Watch:
    """Counts the images that a cascade passes on, and warns, once, when they are far more than when it was fitted.

    For each stage but the last the share passed on has an upper bound (Clopper and Pearson, from the images of the
    fit); an exact binomial test asks whether as many as there were would be passed on by chance. It looks when there
    are 64 images, and whenever they are twice as many, so that it stays quiet where nothing has moved.
    """

    def __init__(self, stages: Sequence[Stage]):
        """
        Args:
            stages: The stages.
        """
        self.stages = stages
        self.seen = [[0, 0] for _ in stages[:-1]]
        self.next = [FIRST_LOOK for _ in stages[:-1]]
        self.warned = False

    def add(self, counts: Sequence[Tuple[int, int]]) -> None:
        """Take in how many images each stage saw and passed on."""
        for seen, more in zip(self.seen, counts):
            seen[0] += more[0]
            seen[1] += more[1]

    def look(self, now: bool = False) -> None:
        """Warn if there is something to say, and it is time to look, or `now`."""
        for i, (stage, (reached, passed)) in enumerate(zip(self.stages, self.seen)):
            if self.warned or not stage.reached or not ((now and reached) or reached >= self.next[i]):
                continue
            while self.next[i] <= reached:
                self.next[i] *= 2
            most = binomial_upper(stage.passed, stage.reached, FITTED_LEVEL)
            if binomial_tail(passed, reached, most) <= FALSE_ALARM:
                self.warned = True
                _logger.warning(
                    f'The cascade passes on {passed / reached:.1%} of {reached:,} images after stage {i + 1} '
                    f'({plain(stage.name)}), and passed on {stage.passed / stage.reached:.1%} of {stage.reached:,} '
                    f'when it was fitted: the images have moved, and it costs more than it did. Look at them (pst-timm '
                    f'monitor check), and fit it again.')


class CascadeClassifier(nn.Module):
    """A cascade as whatever takes a timm model knows one: images to logits, preprocessing in `pretrained_cfg`."""

    def __init__(self, cascade: Cascade):
        """
        Args:
            cascade: The cascade.
        """
        super().__init__()
        self.cascade = cascade
        self.num_classes = cascade.num_classes
        self.in_chans = cascade.input_size[0]
        self.pretrained_cfg = {**cascade.config, 'architecture': 'cascade', 'num_classes': cascade.num_classes}
        if cascade.class_names:
            self.pretrained_cfg['label_names'] = cascade.class_names
        self.default_cfg = self.pretrained_cfg
        self.checkpoint_cfg = {key: cascade.config[key] for key in (
            'input_size', 'mean', 'std', 'interpolation', 'crop_pct')}
        self.routed: Optional[Tuple[CascadeOutput, List[Tuple[int, int]]]] = None
        """What came of the last batch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.routed = self.cascade.route(x)
        return self.routed[0].logits

    def finished_as(self) -> str:
        """See `engine.protocols.Finished`."""
        return 'a cascade'

    def own_metrics(self) -> List[Metric]:
        """What an evaluation measures of it beside its accuracy."""
        return [Routing(self)]


class Routing(Metric):
    """Shares of the stages, mean cost, calibration error and failure AUROC of a cascade, batch by batch."""

    def __init__(self, model: CascadeClassifier):
        """
        Args:
            model: The cascade that is evaluated.
        """
        self.model = model
        # of its own, at the end: the images of an evaluation come class by class
        self.watch = Watch(list(model.cascade.stages))
        self.parts: List[Tuple[torch.Tensor, ...]] = []

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        routed = self.model.routed
        if routed is None or len(routed[0].stage) != len(target):
            raise PSTError('A cascade is evaluated in one piece: leave out --num-gpu.')
        self.watch.add(routed[1])
        found = output.float().cpu().double()
        self.parts.append((found, target.cpu(), routed[0].stage.cpu(), routed[0].cost.cpu()))

    def results(self) -> Dict[str, Any]:
        """Shares in percent, mean cost of an image with its unit, `ece` and `failure_auroc` (None if all are right)."""
        self.watch.look(now=True)
        logits, target, stage, cost = (torch.cat(parts) for parts in zip(*self.parts))
        cascade = self.model.cascade
        confidence, prediction = logits.softmax(dim=-1).max(dim=-1)
        auroc = failure_auroc(confidence, prediction.eq(target))
        shares = stage.bincount(minlength=len(cascade.stages)).double() / len(stage)
        return {
            **{f'stage{i + 1}_share': round(100 * share, 4) for i, share in enumerate(shares.tolist())},
            'mean_cost': round(cost.double().mean().item(), 6),
            'cost_unit': cascade.unit,
            'ece': round(calibration_error(logits, target), 5),
            'failure_auroc': None if auroc is None else round(auroc, 5),
        }


def _check_alike(stages: Sequence[Stage]) -> None:
    """Make sure that stages know the same classes, and take the same images, but for their size.

    Raises:
        PSTError: If they do not; the message names two that differ.
    """
    first = stages[0]
    for stage in stages[1:]:
        pair = f'{plain(first.source, 300)} and {plain(stage.source, 300)}'
        counts = first.model.num_classes, stage.model.num_classes
        if counts[0] != counts[1]:
            raise PSTError(f'{pair} know {counts[0]} and {counts[1]} classes: all stages need the same.')
        if first.input_size[0] != stage.input_size[0]:
            raise PSTError(
                f'{pair} take images of {first.input_size[0]} and {stage.input_size[0]} channels: all stages need the '
                f'same.')
    named = [(stage, names) for stage in stages if (names := label_names(stage.model))]
    for stage, names in named[1:]:
        i = next((i for i, (a, b) in enumerate(zip(named[0][1], names)) if a != b), None)
        if i is not None:
            raise PSTError(
                f'{plain(named[0][0].source, 300)} and {plain(stage.source, 300)} know other classes, or in another '
                f'order: class {i} is {plain(named[0][1][i])!r} in the former and {plain(names[i])!r} in the latter. '
                f'All stages need the same.')


# the file

def read_cascade(path: Path) -> Dict[str, Any]:
    """What the file of a cascade says, held to its rules; no stage is opened.

    Raises:
        PSTError: If it cannot be read, or says anything else.
    """
    check_ordinary(path)
    try:
        with open(path, 'rb') as file:
            text = file.read(MOST_JSON + 1)
    except OSError as e:
        raise PSTError(f'{path} cannot be read ({e.strerror}).') from e
    value = parse_json(text, path)
    if not isinstance(value, dict) or value.get('format') != FORMAT:
        raise PSTError(f'{path} is not a cascade: pst-timm cascade fit writes one.')
    value = check_facts(path, value, CASCADE, 'a cascade')
    missing = [key for key in ('version', 'cost', 'num_classes', 'stages') if key not in value]
    missing += [
        f'stages[{i}].{key}' for i, stage in enumerate(value.get('stages', ())) for key in NEEDED
        if stage.get(key) is None]
    if missing:
        raise PSTError(f'{path} is no whole cascade: it does not tell {missing[0]}. Fit it again.')
    odd = next((i for i, stage in enumerate(value['stages']) if stage['passed'] > stage['reached']), None)
    if odd is not None:
        raise PSTError(f'{path} is garbled: stage {odd + 1} passed on more images than it saw. Fit it again.')
    return value


def resolve_stage(path: Path, source: str) -> Path:
    """The file or folder that a cascade names as a stage: beside the cascade or below, links followed.

    Raises:
        PSTError: If it is elsewhere, or not there.
    """
    root = Path(os.path.realpath(path.parent))
    told = f'{path} names the stage {plain(source, 200)!r}'
    if Path(source).suffix == SUFFIX:
        raise PSTError(f'{told}, which is no single model. Fit it again, of single models.')
    stage = path.parent / source
    try:
        read = [stage, *stage.iterdir()] if stage.is_dir() else [stage, stage.with_name('config.json')]
        read += [stage.with_suffix('.bin')] if stage.suffix == '.xml' else []
        places = [Path(os.path.realpath(place)) for place in read]
    except (OSError, ValueError) as e:
        raise PSTError(f'{told}, which cannot be read ({getattr(e, "strerror", None) or e}).') from None
    if os.path.isabs(source) or places[0] == root or not all(place.is_relative_to(root) for place in places):
        raise PSTError(
            f'{told}, which is not beside it or below, and no other place is opened for a file. If you trust it, name '
            f'the stages yourself: pst_timm.Cascade.from_file(path, stages=[...]).')
    if not os.path.lexists(stage):
        raise PSTError(f'{told}, which is not there. Put it back, or fit the cascade again.')
    return stage


def write_cascade(cascade: Cascade, sources: Sequence[str]) -> str:
    """The text of a cascade's file.

    Args:
        cascade: The cascade.
        sources: Its stages, relative to the folder of the file.
    """
    stages = [
        {'source': source, 'img_size': list(stage.input_size[1:]), **stage.settings, 'temperature': stage.temperature,
         'threshold': stage.threshold, 'cost': stage.cost, 'reached': stage.reached, 'passed': stage.passed}
        for source, stage in zip(sources, cascade.stages)]
    value = {
        'format': FORMAT, 'version': 1, 'cost': cascade.cost, 'num_classes': cascade.num_classes,
        'class_names': cascade.class_names, 'stages': stages, 'fit': cascade.facts}
    check_budget(value)
    return json.dumps(value, indent=2) + '\n'
