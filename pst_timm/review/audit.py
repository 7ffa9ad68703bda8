"""What is wrong with a folder of images: leakage, wrong labels, copies, outliers, odd sizes, broken files.

Nothing is deleted or moved: what was found is written to a folder of its own.
"""
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

from pst_timm.checkpoints import read_checkpoint
from pst_timm.checkpoints.reading import is_file
from pst_timm.data.datasets import TRAINING, VALIDATION, create_eval_dataset
from pst_timm.data.duplicates import Prints, duplicate_groups, likeness, read_prints
from pst_timm.data.images import find_images, listed
from pst_timm.data.samples import LOOKS, Samples
from pst_timm.data.scores import (
    RANKINGS,
    likely_wrong,
    odd_sizes,
    outlier_scores,
    rank_wrong,
    robust_z,
    score_labels,
    share_wrong,
)
from pst_timm.engine import validate_args
from pst_timm.utils.errors import PSTError
from pst_timm.utils.files import check_output, write_csv
from pst_timm.utils.markdown import plain

from .answers import Subject, open_labelled
from .crossing import Cross, answers_of, cross_answers
from .findings import AuditReport, Copy
from .sheet import SHEETS, Tile, draw_sheet, shown

__all__ = [
    'audit', 'check_folder', 'open_others', 'open_split', 'root_of', 'seen_in_training', 'sheet_of', 'write_report',
]

AUDIT, WEIGHTS, DUPLICATES, SHEET = 'audit.csv', 'weights.csv', 'duplicates.csv', 'sheet.png'
# what folders of splits are called
SPLITS = (*TRAINING, *VALIDATION, 'test')


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
        crops: bool = False,
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
        crops: Whether they are the means over five crops of each image.

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
        crossed = cross_answers(kept, labels, cross, alike, batch_size, workers, mirror, crops)
        probabilities, subject = crossed.probabilities, subject or crossed.subject
    elif subject is None:
        raise PSTError('No model is named, and none is to be trained.')
    # where the folds have answered, this is for the embeddings alone
    views = (mirror, crops) if cross is None else ()
    mine = answers_of(subject, kept, batch_size, workers, *views, title=split)
    if cross is None:
        probabilities = mine.probabilities
    # the question is which of the classes that are here
    present = np.zeros_like(probabilities)
    present[:, here] = probabilities[:, here]
    probabilities = present / np.maximum(present.sum(axis=1, keepdims=True), 1e-300)
    embeddings = [mine.embeddings] + [
        answers_of(subject, other.subset(prints[name].kept), batch_size, workers, *views, title=name).embeddings
        for name, other in (others or {}).items() if len(prints[name].kept)]

    scores = score_labels(probabilities, labels)
    order = rank_wrong(probabilities, labels, ranking)
    wrong = np.full(len(labels), False)
    wrong[order[:round(share_wrong(probabilities[:, here], np.searchsorted(here, labels)) * len(labels))]] = True
    wrong &= scores.predicted != labels
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
        confident=likely_wrong(probabilities, labels),
        order=order,
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


def open_split(
        subject: Optional[Subject],
        data_dir: str,
        split: str = 'validation',
        channels: Optional[int] = None,
) -> Tuple[Samples, str]:
    """The images to audit.

    Args:
        subject: The model, by whose class names the folders go where it knows any; None where the folds will bring one.
        data_dir: The data.
        split: Split, or folder below the data.
        channels: Channels of the images that the models of the folds take, None without folds.

    Returns:
        The images, and their mode, 'RGB' or 'L'.

    Raises:
        PSTError: If there are no such images, or model and folds take others.
    """
    if subject is None:
        args = validate_args(data_dir=data_dir, split=split, in_chans=channels)
        return Samples.labelled(create_eval_dataset(args, split, None), None), 'L' if channels == 1 else 'RGB'
    if channels not in (None, len(subject.mode)):
        raise PSTError(
            f'{subject.source} takes images of {len(subject.mode)} channel(s), and the models of the folds would take '
            f'{channels}: say --in-chans {len(subject.mode)} after --, or leave SOURCE out.')
    return open_labelled(subject, data_dir, split), subject.mode


def open_others(
        mode: str,
        samples: Samples,
        data_dir: str,
        wanted: Optional[Sequence[str]] = None,
) -> Dict[str, Samples]:
    """Images of other splits in the same folder, in which copies are looked for.

    Args:
        mode: Mode of the images, 'RGB' or 'L'.
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
        loose = Samples.loose(paths, samples.transform, mode)
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
    if split == told or (split in TRAINING and told in (*TRAINING, None)):
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
