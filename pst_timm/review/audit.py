"""What is wrong with a folder of images: leakage, wrong labels, copies, outliers, odd sizes, broken files.

Nothing is deleted or moved: what was found is written to a folder of its own.
"""
import logging
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

from pst_timm.checkpoints import read_checkpoint
from pst_timm.checkpoints.reading import is_file
from pst_timm.data.duplicates import Prints, duplicate_groups, likeness, read_prints
from pst_timm.data.images import find_images, listed
from pst_timm.data.samples import LOOKS, Samples
from pst_timm.data.scores import (
    RANKINGS,
    Scores,
    example_weights,
    likely_wrong,
    odd_sizes,
    outlier_scores,
    rank_wrong,
    robust_z,
    score_labels,
)
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, write_csv
from pst_timm.utils.markdown import plain

from .answers import Subject
from .crossing import Cross, answers_of, cross_answers
from .sheet import SHEETS, Tile, draw_sheet, shown

__all__ = ['AuditReport', 'Copy', 'audit', 'check_folder', 'open_others', 'seen_in_training', 'write_report']

_logger = logging.getLogger(__name__)

AUDIT, WEIGHTS, DUPLICATES, SHEET = 'audit.csv', 'weights.csv', 'duplicates.csv', 'sheet.png'
# what folders of splits are called
SPLITS = ('train', 'training', 'val', 'valid', 'validation', 'eval', 'evaluation', 'test')
FAR = 5.  # robust standard deviations from which on an image is an outlier


class Copy(NamedTuple):
    """An image of the split that has a copy."""
    image: str
    of: str
    """The copy."""
    of_split: str
    exact: bool
    """Whether all pixels are the same."""
    likeness: float
    """Correlation of small grey copies of the two."""
    label: str
    of_label: str


@dataclass
class AuditReport:
    """What an audit found; arrays go over the images that can be read, in their order."""
    split: str
    names: List[str]
    class_names: List[str]
    labels: np.ndarray
    """int64 (N,)."""
    scores: Scores
    wrong: np.ndarray
    """bool (N,): which labels are likely wrong, by confident learning."""
    order: np.ndarray
    """int64 (N,): the images in the order in which a person should look at their labels."""
    suggested: np.ndarray
    """int64 (N,): the most probable class, of likely wrong labels the most probable other one."""
    far: np.ndarray
    """float64 (N,): robust z-score of how far each image is from the others."""
    odd: np.ndarray
    """bool (N,): which images are of odd size."""
    sizes: np.ndarray
    """int64 (N, 2): width and height."""
    copies: List[Copy]
    """Of other splits first."""
    broken: List[str]
    broken_elsewhere: Dict[str, List[str]] = field(default_factory=dict)
    """Images of other splits that cannot be read."""
    notes: List[str] = field(default_factory=list)
    """What to keep in mind, in sentences."""

    @property
    def leaks(self) -> List[Copy]:
        """Copies in other splits."""
        return [copy for copy in self.copies if copy.of_split != self.split]

    @property
    def outliers(self) -> np.ndarray:
        """Which images (N,) are outliers."""
        return self.far > FAR

    def rows(self) -> List[Dict[str, Any]]:
        """A row for each image, broken ones last."""
        ranks = np.empty(len(self.order), np.int64)
        ranks[self.order] = np.arange(1, len(self.order) + 1)
        copies: Dict[str, Copy] = {}
        for copy in self.copies:
            copies.setdefault(copy.image, copy)
        rows = []
        for i, name in enumerate(self.names):
            copy = copies.get(name)
            rows.append(dict(
                image=name,
                label=self.class_names[self.labels[i]],
                suggested=self.class_names[self.suggested[i]],
                loss=round(float(self.scores.loss[i]), 6),
                margin=round(float(self.scores.margin[i]), 6),
                confidence=round(float(self.scores.confidence[i]), 6),
                self_confidence=round(float(self.scores.self_confidence[i]), 6),
                wrong_label='yes' if self.wrong[i] else '',
                wrong_rank=int(ranks[i]),
                duplicate_of=f'{copy.of_split}/{copy.of}' if copy else '',
                outlier='yes' if self.outliers[i] else '',
                outlier_score=round(float(self.far[i]), 3),
                odd_size='yes' if self.odd[i] else '',
                width=int(self.sizes[i, 0]),
                height=int(self.sizes[i, 1]),
                broken='',
            ))
        empty = dict.fromkeys(rows[0], '') if rows else {}
        return rows + [{**empty, 'image': name, 'broken': 'yes'} for name in self.broken]

    def weights(self) -> List[Dict[str, Any]]:
        """A row with a weight for each image, for `--hard-examples`: hard ones more, likely wrong labels nothing."""
        weights = example_weights(self.scores.loss, self.wrong)
        return [dict(image=name, weight=round(float(w), 6)) for name, w in zip(self.names, weights)]

    def duplicates(self) -> List[Dict[str, Any]]:
        """A row for each copy, those in other splits first."""
        return [dict(
            image=c.image, label=c.label, duplicate_of=c.of, split=c.of_split, its_label=c.of_label,
            kind='same pixels' if c.exact else 'nearly the same', likeness=round(c.likeness, 5)) for c in self.copies]

    def summary(self) -> List[str]:
        """What was found, in lines for a person, the gravest first."""
        return [*self._leakage(), *self._faults(), *self._labels(), *self._oddities(), *self.notes]

    def _leakage(self) -> List[str]:
        lines = []
        for split, count in Counter(copy.of_split for copy in self.leaks).items():
            mine = [copy for copy in self.leaks if copy.of_split == split]
            exact = sum(copy.exact for copy in mine)
            other = sum(copy.label != copy.of_label for copy in mine)
            lines.append(
                f'LEAKAGE: {_images(count)} of {self.split!r} {_are(count)} in {split!r} too ({exact} pixel by pixel, '
                f'{count - exact} nearly){f", {other} of them with another label" if other else ""}, such as '
                f'{plain(mine[0].image)} = {plain(mine[0].of)}: a score on either split is not to be trusted.')
        return lines or ['Leakage: none found.']

    def _faults(self) -> List[str]:
        lines = []
        for split, names in {self.split: self.broken, **self.broken_elsewhere}.items():
            if names:
                lines.append(f'Broken: {_images(len(names))} of {split!r} cannot be read: {_some(names)}.')
        return lines

    def _labels(self) -> List[str]:
        wrong = [i for i in self.order if self.wrong[i]]
        if not wrong:
            return [f'Wrong labels: none of {len(self.names)} looks wrong.']
        first = [
            f'{plain(self.names[i])} (given {plain(self.class_names[self.labels[i]])}, looks like '
            f'{plain(self.class_names[self.suggested[i]])})' for i in wrong[:3]]
        return [
            f'Wrong labels: {len(wrong)} of {len(self.names)} look wrong ({len(wrong) / len(self.names):.1%}); the '
            f'first: {", ".join(first)}.']

    def _oddities(self) -> List[str]:
        lines = []
        within = [copy for copy in self.copies if copy.of_split == self.split]
        if within:
            other = sum(copy.label != copy.of_label for copy in within)
            lines.append(
                f'Duplicates: {_images(len(within))} of {self.split!r} {_are(len(within))} there before'
                f'{f", {other} of them with another label" if other else ""}, such as {plain(within[0].image)} = '
                f'{plain(within[0].of)}.')
        for title, which, score in (
                ('Outliers', self.outliers, self.far), ('Odd sizes', self.odd, -self.sizes.min(axis=1))):
            found = sorted(np.flatnonzero(which), key=lambda i: -score[i])
            if found:
                lines.append(f'{title}: {_images(len(found))}: {_some([self.names[i] for i in found])}.')
        return lines


def _images(count: int) -> str:
    return f'{count} image{"" if count == 1 else "s"}'


def _are(count: int) -> str:
    return 'is' if count == 1 else 'are'


def _some(names: Sequence[str]) -> str:
    return listed([plain(name) for name in names])


def audit(
        subject: Optional[Subject],
        samples: Samples,
        others: Optional[Mapping[str, Samples]] = None,
        *,
        split: str = 'validation',
        cross: Optional[Cross] = None,
        ranking: str = RANKINGS[0],
        batch_size: int = 64,
        workers: int = 0,
        mirror: bool = False,
) -> AuditReport:
    """Look for what is wrong with the images of a split and their labels.

    Args:
        subject: The model that answers; with `cross` it may be None, and then that of the first fold tells which
            images are near each other.
        samples: The images, with labels.
        others: Images of other splits by name, in which copies are looked for.
        split: Name of the split.
        cross: How to train models that have not seen what they answer to; None if the subject has not.
        ranking: One of `RANKINGS`.
        batch_size: Images at a time.
        workers: Processes that read images.
        mirror: Whether the answers are the means over each image and its mirror image.

    Raises:
        PSTError: If there is nothing to audit; else as `answers` and `cross_answers`.
        Interrupted: If a training was asked to stop.
    """
    prints = {split: read_prints(samples, workers, f'Reading {split}')}
    for name, other in (others or {}).items():
        prints[name] = read_prints(other, workers, f'Reading {name}')
    if not len(prints[split].kept):
        raise PSTError(f'Not one of the {len(samples)} images could be read, such as {listed(samples.names, 1)}.')
    kept = samples.subset(prints[split].kept)
    labels = prints[split].labels
    if samples.class_names is None:
        raise PSTError('The images have no labels: name a folder of class folders.')
    here = np.unique(labels)
    if len(here) < 2:
        raise PSTError(
            f'All images of {split!r} have the label {listed([samples.class_names[here[0]]])}: there is nothing to '
            f'compare it with. Name a folder of class folders.')

    if cross is not None:
        alike = duplicate_groups(prints[split].digests, prints[split].thumbs)
        crossed = cross_answers(kept, labels, cross, alike, batch_size, workers, mirror)
        probabilities, subject = crossed.probabilities, subject or crossed.subject
    elif subject is None:
        raise PSTError('No model is named, and none is to be trained.')
    mine = answers_of(subject, kept.subset(range(len(kept)), subject.transform), batch_size, workers, mirror, split)
    if cross is None:
        probabilities = mine.probabilities
    # the question is which of the classes that are here
    present = np.zeros_like(probabilities)
    present[:, here] = probabilities[:, here]
    probabilities = present / np.maximum(present.sum(axis=1, keepdims=True), 1e-300)
    embeddings = [mine.embeddings] + [
        answers_of(
            subject, other.subset(prints[name].kept, subject.transform), batch_size, workers, mirror, name).embeddings
        for name, other in (others or {}).items() if len(prints[name].kept)]

    scores = score_labels(probabilities, labels)
    wrong = likely_wrong(probabilities, labels)
    best = probabilities.copy()
    best[np.flatnonzero(wrong), labels[wrong]] = -1
    sizes = prints[split].looks[:, [LOOKS.index('width'), LOOKS.index('height')]]
    return AuditReport(
        split=split,
        names=kept.names,
        class_names=list(samples.class_names),
        labels=labels,
        scores=scores,
        wrong=wrong,
        order=rank_wrong(probabilities, labels, ranking),
        suggested=best.argmax(axis=1),
        far=robust_z(outlier_scores(mine.embeddings), 1e-6),
        odd=odd_sizes(*sizes.T),
        sizes=sizes.astype(np.int64),
        copies=_find_copies(split, {split: samples, **(others or {})}, prints, np.concatenate(embeddings), labels),
        broken=prints[split].broken,
        broken_elsewhere={name: found.broken for name, found in prints.items() if name != split},
    )


def _find_copies(
        split: str,
        samples: Mapping[str, Samples],
        prints: Mapping[str, Prints],
        embeddings: np.ndarray,
        labels: np.ndarray,
) -> List[Copy]:
    """Copies of the images of the first split: one in each of the other splits that has any, and the first within."""
    names = [(name, samples[name].names[i]) for name, found in prints.items() for i in found.kept]
    digests = [digest for found in prints.values() for digest in found.digests]
    thumbs = np.concatenate([found.thumbs for found in prints.values()])
    groups = duplicate_groups(digests, thumbs, embeddings)
    members: Dict[int, List[int]] = {}
    for i in np.flatnonzero(groups >= 0):
        members.setdefault(groups[i], []).append(i)

    def label(i: int) -> str:
        return samples[split].class_names[labels[i]] if i < len(labels) else Path(names[i][1]).parent.name

    def alike(i: int, j: int) -> Tuple[bool, float]:
        return digests[i] == digests[j], max(float(likeness(thumbs[i], t)) for t in (thumbs[j], thumbs[j][:, ::-1]))

    across, within = [], []
    for i in range(len(labels)):
        group = members.get(groups[i], [i]) if groups[i] >= 0 else [i]
        by_split: Dict[str, List[int]] = {}
        for j in group:
            if j != i:
                by_split.setdefault(names[j][0], []).append(j)
        for name, twins in by_split.items():
            if name == split and i == group[0]:
                continue  # the first is the one that was there before
            twin = max(twins, key=lambda j: alike(i, j)) if name != split else group[0]
            found = Copy(names[i][1], names[twin][1], name, *alike(i, twin), label(i), label(twin))
            (within if name == split else across).append(found)
    return across + within


def open_others(
        subject_mode: str,
        samples: Samples,
        data_dir: str,
        wanted: Optional[Sequence[str]] = None,
) -> Dict[str, Samples]:
    """Images of other splits in the same folder, in which copies are looked for.

    Args:
        subject_mode: Mode of the images, 'RGB' or 'L'.
        samples: Those of the split that is audited.
        data_dir: The data.
        wanted: Names of the folders; None for those that are there and called as splits are.

    Raises:
        PSTError: If a folder is not there, or is the split itself.
    """
    root = root_of(samples)
    if root is None:
        if wanted:
            raise PSTError(f'--against {wanted[0]}: {data_dir} is a .tar file, which has no other splits.')
        return {}
    here = Path(data_dir)
    found = wanted if wanted is not None else [
        name for name in SPLITS if (here / name).is_dir() and not os.path.samefile(root, here / name)
        and root != here]
    others = {}
    for name in dict.fromkeys(found):
        folder = here / name
        if not folder.is_dir():
            raise PSTError(f'--against {name}: there is no folder {folder}.')
        if os.path.samefile(folder, root):
            raise PSTError(f'--against {name}: that is the split that is audited; copies within it are found anyway.')
        paths, _ = find_images(folder)
        loose = Samples.loose(paths, samples.transform, subject_mode)
        loose.names = [path.relative_to(folder).as_posix() for path in paths]
        others[name] = loose
    return others


def root_of(samples: Samples) -> Optional[Path]:
    """The folder that the names of images are relative to, None where they are in no folder."""
    if samples.paths is None:
        return None
    return samples.paths[0].parents[len(Path(samples.names[0]).parts) - 1]


def seen_in_training(source: str, split: str) -> Optional[str]:
    """A sentence of warning if a model was trained on the images that it is to score, as far as its file tells."""
    told = read_checkpoint(source).args.get('train_split') if is_file(source) else None
    usual = SPLITS[:2]
    if split == told or (split in usual and told in (*usual, None)):
        why = f'{source} says that it was trained on the split {plain(split)!r}' if told else (
            f'{split!r} is what models are trained on')
        return (
            f'NOTE: {why}. If these are the same images, it knows their labels by heart, and wrong ones hardly show: '
            f'--cross K scores them by models that have not seen them.')
    return None


def check_folder(
        folder: Path,
        sheet: str = SHEET,
        overwrite: bool = False,
        inputs: Sequence[os.PathLike] = (),
        data: Optional[Path] = None,
) -> None:
    """Make sure, before the work, that an audit can be written to a folder.

    Args:
        folder: The folder; it may not be there yet.
        sheet: Name of the contact sheet.
        overwrite: Whether an audit that is there may be replaced.
        inputs: Files that are read.
        data: Folder of the images, which must stay as it is.

    Raises:
        PSTError: If it cannot, or must not.
    """
    if Path(sheet).name != sheet or Path(sheet).suffix.lower() not in SHEETS:
        raise PSTError(f'--sheet {sheet}: expected the name of a file in the folder, ending in {" or ".join(SHEETS)}.')
    if data is not None and Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(data)):
        raise PSTError(
            f'{folder} is among the images of {data}, which would no longer be what they are: choose another --output.')
    if not folder.is_dir():
        check_output(folder)
        return
    for name in (AUDIT, WEIGHTS, DUPLICATES, sheet):
        check_output(folder / name, overwrite, inputs)


def write_report(
        report: AuditReport,
        folder: Path,
        samples: Samples,
        others: Optional[Mapping[str, Samples]] = None,
        sheet: str = SHEET,
        most: int = 48,
) -> List[Path]:
    """Write what an audit found.

    Args:
        report: The report.
        folder: Folder for the files; those that are there are replaced.
        samples: The images that were audited.
        others: Those of the other splits.
        sheet: Name of the contact sheet, .png or .pdf.
        most: Most images of a kind on it.

    Returns:
        The files.

    Raises:
        PSTError: If one cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise PSTError(f'Cannot write to {folder} ({e.strerror}): choose another --output.') from e
    columns = ('image', 'label', 'duplicate_of', 'split', 'its_label', 'kind', 'likeness')
    write_csv(folder / AUDIT, _writable(report.rows()))
    write_csv(folder / WEIGHTS, _writable(report.weights()))
    write_csv(folder / DUPLICATES, _writable(report.duplicates()), columns)
    draw_sheet(folder / sheet, sheet_of(report, samples, others or {}, most))
    return [folder / name for name in (AUDIT, WEIGHTS, DUPLICATES, sheet)]


def _writable(rows: Sequence[Mapping[str, Any]]) -> List[Dict[str, Any]]:
    """Rows whose texts any file takes: file systems have names that are no text."""
    return [{k: v.encode('utf-8', 'backslashreplace').decode() if isinstance(v, str) else v for k, v in row.items()}
            for row in rows]


def sheet_of(
        report: AuditReport,
        samples: Samples,
        others: Mapping[str, Samples],
        most: int,
) -> Dict[str, List[Tile]]:
    """Images for the contact sheet by the heading they go under, those with the worst labels first.

    Args:
        report: The report.
        samples: The images that were audited.
        others: Those of the other splits.
        most: Most images under a heading.
    """
    places = {split: {name: i for i, name in enumerate(found.names)}
              for split, found in {report.split: samples, **others}.items()}

    def image(split: str, name: str) -> Image.Image:
        return (samples if split == report.split else others[split]).read(places[split][name])[0]

    def labelled(i: int) -> Tile:
        given, suggested = report.class_names[report.labels[i]], report.class_names[report.suggested[i]]
        return Tile(shown(image(report.split, report.names[i])), [
            f'given {given} ({report.scores.self_confidence[i]:.1%})',
            f'looks like {suggested} ({report.scores.confidence[i]:.0%})', report.names[i]])

    wrong = [i for i in report.order if report.wrong[i]]
    headings = {
        f'Likely wrong labels, the first {min(most, len(wrong))} of {len(wrong)}': [
            labelled(i) for i in wrong[:most]]}
    pairs = report.leaks[:most // 2]
    headings[f'Also in another split, the first {len(pairs)} of {len(report.leaks)}: image and copy'] = [
        tile for copy in pairs for tile in (
            Tile(shown(image(report.split, copy.image)), [copy.label, report.split, copy.image]),
            Tile(shown(image(copy.of_split, copy.of)), [copy.of_label, copy.of_split, copy.of]))]
    far = sorted(np.flatnonzero(report.outliers), key=lambda i: -report.far[i])
    headings[f'Unlike the others, the first {min(most, len(far))} of {len(far)}'] = [
        Tile(shown(image(report.split, report.names[i])), [
            report.class_names[report.labels[i]], f'{report.far[i]:.1f} deviations', report.names[i]])
        for i in far[:most]]
    return {heading: tiles for heading, tiles in headings.items() if tiles}
