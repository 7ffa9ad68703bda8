"""What the classes of a model are called: in its files, and for people."""
import re
from collections import Counter
from typing import Any, List, Mapping, Sequence

import torch.nn as nn
from timm.data import ImageNetInfo, infer_imagenet_subset

__all__ = ['label_names', 'readable_names']

SYNSET = re.compile(r'n\d{8}')


def label_names(model: nn.Module) -> list:
    """Names of a classifier's classes in the order of its outputs; empty where they are not known."""
    known = list(model.pretrained_cfg.get('label_names') or ())
    # a classifier that was replaced has other classes
    return known if len(known) == model.num_classes else []


def readable_names(names: Sequence[str], cfg: Mapping[str, Any], known: bool = True) -> List[str]:
    """Names of a model's classes for people.

    Described classes by their descriptions, ImageNet's ('n02056570') by the first of their words ('king penguin'),
    and so those of timm's own models of ImageNet, which know no names; of equal ones, with the name. All others as they
    are.

    Args:
        names: Names of the classes, in the order of the model's outputs.
        cfg: Its pretrained configuration.
        known: Whether the names are those of its classes; otherwise they are made up, such as numbers.
    """
    def first_word(words: str) -> str:
        return words.split(',')[0]  # of 'king penguin, Aptenodytes patagonica'

    described = dict(cfg.get('label_descriptions') or {})
    subset = infer_imagenet_subset(cfg)
    if subset and not known and (cfg.get('hf_hub_id') or '').startswith('timm/'):
        words = [first_word(words) for words in ImageNetInfo(subset).label_descriptions()]
    else:
        if any(map(SYNSET.fullmatch, names)):
            synsets = ImageNetInfo('imagenet-22k').label_descriptions(as_dict=True)
            own = {name: text for name, text in described.items() if text != synsets.get(name)}
            described = {**{name: first_word(words) for name, words in synsets.items()}, **own}
        words = [described.get(name) or name for name in names]
    counts = Counter(words)
    return [word if counts[word] == 1 or word == name else f'{word} ({name})' for word, name in zip(words, names)]
