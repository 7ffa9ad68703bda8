"""The layers of PST: tensors in, tensors out. They know torch and timm.layers only."""
from .attention import FINE_FUSIONS, HasAttention, PyramidSparseAttention, SparseTokens, attention_set
from .conv_norm import Concat, ConvNorm, FusedConvAct, MergeAct, MergeNorm, Pair, SplitConvAct
from .module import PyramidSparseBlock, PyramidSparseTransformer
from .pyramid import PANPyramid, PSTPyramid

__all__ = [
    'FINE_FUSIONS',
    'Concat',
    'ConvNorm',
    'FusedConvAct',
    'HasAttention',
    'MergeAct',
    'MergeNorm',
    'PANPyramid',
    'PSTPyramid',
    'Pair',
    'PyramidSparseAttention',
    'PyramidSparseBlock',
    'PyramidSparseTransformer',
    'SparseTokens',
    'SplitConvAct',
    'attention_set',
]
