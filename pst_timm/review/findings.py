"""What an audit found, as rows and in words."""
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Dict, List, NamedTuple, Sequence

import numpy as np

from pst_timm.data.images import listed
from pst_timm.data.scores import Scores, example_weights
from pst_timm.utils.markdown import plain

__all__ = ['AuditReport', 'Copy']

FAR = 5.  # robust standard deviations from which on an image is an outlier
JUDGE = 0.5  # share of labels from which on a model that agrees with so many is a judge of the others


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
    """Name of its folder, empty where it is in none."""

    @property
    def relabelled(self) -> bool:
        """Whether the two have different labels."""
        return bool(self.of_label) and self.label != self.of_label


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
    """bool (N,): which labels are likely wrong: the first in the order, as many as are estimated to be wrong."""
    confident: np.ndarray
    """bool (N,): which images confident learning counts as another class."""
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
    """Images that cannot be read, perhaps none, of each other split that was looked at."""
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
                confident_learning='yes' if self.confident[i] else '',
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
        # a model that is no judge must not take images away
        weights = example_weights(self.scores.loss, self.wrong & (self.agreement >= JUDGE))
        return [dict(image=name, weight=round(float(w), 6)) for name, w in zip(self.names, weights)]

    def duplicates(self) -> List[Dict[str, Any]]:
        """A row for each copy, those in other splits first."""
        return [dict(
            image=c.image, label=c.label, duplicate_of=c.of, split=c.of_split, its_label=c.of_label,
            kind='same pixels' if c.exact else 'nearly the same', likeness=round(c.likeness, 5)) for c in self.copies]

    def summary(self) -> List[str]:
        """What was found, in lines for a person, the gravest first."""
        return [*self._leakage(), *self._faults(), *self._labels(), *self._oddities(), *self.notes]

    @property
    def agreement(self) -> float:
        """Share of the images that the model takes for what they are labelled as."""
        return float(np.mean(self.scores.predicted == self.labels))

    def _leakage(self) -> List[str]:
        lines = []
        for split, count in Counter(copy.of_split for copy in self.leaks).items():
            mine = [copy for copy in self.leaks if copy.of_split == split]
            exact = sum(copy.exact for copy in mine)
            other = sum(copy.relabelled for copy in mine)
            lines.append(
                f'LEAKAGE: {_images(count)} of {self.split!r} {_are(count)} in {split!r} too ({exact} pixel by pixel, '
                f'{count - exact} nearly){f", {other} of them with another label" if other else ""}, such as '
                f'{plain(mine[0].image)} = {plain(mine[0].of)}: a score on either split is not to be trusted.')
        if not self.broken_elsewhere:
            return ['Leakage: not looked for: no other split is there, or named with --against.']
        return lines or ['Leakage: none found.']

    def _faults(self) -> List[str]:
        lines = []
        for split, names in {self.split: self.broken, **self.broken_elsewhere}.items():
            if names:
                lines.append(f'Broken: {_images(len(names))} of {split!r} cannot be read: {_some(names)}.')
        return lines

    def _labels(self) -> List[str]:
        wrong = [i for i in self.order if self.wrong[i]]
        agreement = f'the model agrees with {self.agreement:.1%} of the given labels'
        if not wrong:
            return [f'Wrong labels: none of {len(self.names)} looks wrong; {agreement}.']
        doubt = [
            'NOTE: a model that agrees with so few labels is no judge of them: look at the sheet before you believe '
            'it. The weights leave no image out.'] if self.agreement < JUDGE else []
        first = [
            f'{plain(self.names[i])} (given {plain(self.class_names[self.labels[i]])}, looks like '
            f'{plain(self.class_names[self.suggested[i]])})' for i in wrong[:3]]
        return [
            f'Wrong labels: {len(wrong)} of {len(self.names)} look wrong ({len(wrong) / len(self.names):.1%}), and '
            f'{agreement}; the first: {", ".join(first)}.', *doubt]

    def _oddities(self) -> List[str]:
        lines = []
        within = [copy for copy in self.copies if copy.of_split == self.split]
        if within:
            other = sum(copy.relabelled for copy in within)
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
