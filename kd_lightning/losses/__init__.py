"""Distillation losses: for each method the function (the formula) and the module (weight, layers, projectors)."""

from kd_lightning.losses.ab import AB, activation_boundary
from kd_lightning.losses.abkd import ABKD, alpha_beta_divergence
from kd_lightning.losses.at import AT, attention_transfer
from kd_lightning.losses.base import DistillationLoss, FeatureLoss, LayersLoss, LogitLoss
from kd_lightning.losses.bce import BCE, bce
from kd_lightning.losses.cat_kd import CATKD, class_attention_transfer
from kd_lightning.losses.cc import CC, correlation_congruence
from kd_lightning.losses.cosine import Cosine, cosine
from kd_lightning.losses.crd import CRD, crd
from kd_lightning.losses.ctkd import CurriculumTemperature
from kd_lightning.losses.cwd import CWD, cwd
from kd_lightning.losses.deit import DeiTHard, DeiTSoft, deit_hard, deit_soft
from kd_lightning.losses.dist import DIST, dist
from kd_lightning.losses.dkd import DKD, dkd
from kd_lightning.losses.fsp import FSP, fsp
from kd_lightning.losses.ft import FT, factor_transfer
from kd_lightning.losses.fused_divergence import FusedDivergence
from kd_lightning.losses.fused_linear_divergence import fused_linear_divergence
from kd_lightning.losses.fused_linear_hard_label import FusedHardLabel, fused_linear_hard_label
from kd_lightning.losses.fused_linear_kl import FusedKL, fused_linear_kl
from kd_lightning.losses.fused_linear_top_k_kl import fused_linear_top_k_kl
from kd_lightning.losses.hard_label import HardLabel, hard_label
from kd_lightning.losses.hint import Hint, hint
from kd_lightning.losses.jensen_shannon import JensenShannon, jensen_shannon
from kd_lightning.losses.kd import KD, kd
from kd_lightning.losses.label_regression import LabelRegression, label_regression
from kd_lightning.losses.logits_mse import LogitsMSE, logits_mse
from kd_lightning.losses.mgd import MGD, mgd
from kd_lightning.losses.mlkd import MLKD, batch_correlation, class_correlation
from kd_lightning.losses.nkd import NKD, nkd
from kd_lightning.losses.nst import NST, nst
from kd_lightning.losses.ofd import OFD, partial_l2
from kd_lightning.losses.pkt import PKT, pkt
from kd_lightning.losses.review_kd import ReviewKD, hierarchical_context
from kd_lightning.losses.rkd import RKD, rkd_angle, rkd_distance
from kd_lightning.losses.rld import RLD, rld
from kd_lightning.losses.sampled_label import SampledLabel, sampled_label
from kd_lightning.losses.sequence_kl import ForwardKL, ReverseKL, SymmetricKL, forward_kl, reverse_kl, symmetric_kl
from kd_lightning.losses.sigmoid_hard import SigmoidHard, sigmoid_hard
from kd_lightning.losses.sigmoid_kd import SigmoidKD, sigmoid_kd
from kd_lightning.losses.simkd import SimKD
from kd_lightning.losses.skewed_kl import SkewedForwardKL, SkewedReverseKL, skewed_forward_kl, skewed_reverse_kl
from kd_lightning.losses.sp import SP, similarity_preserving
from kd_lightning.losses.standardize import standardize_logits
from kd_lightning.losses.supcon import SupCon, supervised_contrastive
from kd_lightning.losses.teacher_bounded import TeacherBounded, teacher_bounded
from kd_lightning.losses.teacher_regression import TeacherRegression, teacher_regression
from kd_lightning.losses.top_k_kl import TopKKL, missing_mass, top_k_kl
from kd_lightning.losses.total_variation import TotalVariation, total_variation
from kd_lightning.losses.ttm import TTM, ttm
from kd_lightning.losses.uld import ULD, sorted_probabilities
from kd_lightning.losses.vid import VID, vid
from kd_lightning.losses.wkd_features import WKDFeatures, wkd_features
from kd_lightning.losses.wkd_logits import WKDLogits, wkd_logits

__all__ = [
    "AB",
    "ABKD",
    "AT",
    "BCE",
    "CATKD",
    "CC",
    "CRD",
    "CWD",
    "DIST",
    "DKD",
    "FSP",
    "FT",
    "KD",
    "MGD",
    "MLKD",
    "NKD",
    "NST",
    "OFD",
    "PKT",
    "RKD",
    "RLD",
    "SP",
    "TTM",
    "ULD",
    "VID",
    "Cosine",
    "CurriculumTemperature",
    "DeiTHard",
    "DeiTSoft",
    "DistillationLoss",
    "FeatureLoss",
    "ForwardKL",
    "FusedDivergence",
    "FusedHardLabel",
    "FusedKL",
    "HardLabel",
    "Hint",
    "JensenShannon",
    "LabelRegression",
    "LayersLoss",
    "LogitLoss",
    "LogitsMSE",
    "ReverseKL",
    "ReviewKD",
    "SampledLabel",
    "SigmoidHard",
    "SigmoidKD",
    "SimKD",
    "SkewedForwardKL",
    "SkewedReverseKL",
    "SupCon",
    "SymmetricKL",
    "TeacherBounded",
    "TeacherRegression",
    "TopKKL",
    "TotalVariation",
    "WKDFeatures",
    "WKDLogits",
    "activation_boundary",
    "alpha_beta_divergence",
    "attention_transfer",
    "batch_correlation",
    "bce",
    "class_attention_transfer",
    "class_correlation",
    "correlation_congruence",
    "cosine",
    "crd",
    "cwd",
    "deit_hard",
    "deit_soft",
    "dist",
    "dkd",
    "factor_transfer",
    "forward_kl",
    "fsp",
    "fused_linear_divergence",
    "fused_linear_hard_label",
    "fused_linear_kl",
    "fused_linear_top_k_kl",
    "hard_label",
    "hierarchical_context",
    "hint",
    "jensen_shannon",
    "kd",
    "label_regression",
    "logits_mse",
    "mgd",
    "missing_mass",
    "nkd",
    "nst",
    "partial_l2",
    "pkt",
    "reverse_kl",
    "rkd_angle",
    "rkd_distance",
    "rld",
    "sampled_label",
    "sigmoid_hard",
    "sigmoid_kd",
    "similarity_preserving",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "sorted_probabilities",
    "standardize_logits",
    "supervised_contrastive",
    "symmetric_kl",
    "teacher_bounded",
    "teacher_regression",
    "top_k_kl",
    "total_variation",
    "ttm",
    "vid",
    "wkd_features",
    "wkd_logits",
]
