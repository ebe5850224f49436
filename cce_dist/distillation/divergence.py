"""Divergences of a student s from a teacher t, as sums over outcomes: what one adds, from both log-probabilities.

Forward KL: t·log(t/s). Reverse KL: s·log(s/t). Generalised Jensen-Shannon (Agarwal et al., "On-Policy Distillation of
Language Models", arXiv 2306.13649, equation 1, with TRL's β): β·t·log(t/m) + (1 − β)·s·log(s/m), m = β·t + (1 − β)·s.

Where both are equal, so are all logarithms, and terms are 0 to the last bit. Tensors may have any shape.
"""

from torch import Tensor

from cce_dist.kernels.two_heads import Kind, log_to_mixture


def terms(log_student: Tensor, log_teacher: Tensor, kind: Kind, beta: float) -> Tensor:
    """Of each outcome; both are finite."""
    difference = log_teacher - log_student
    if kind == "forward":
        return log_teacher.exp() * difference
    if kind == "reverse":
        return log_student.exp() * -difference
    student = log_to_mixture(difference, beta)
    return beta * log_teacher.exp() * (difference + student) + (1 - beta) * log_student.exp() * student
