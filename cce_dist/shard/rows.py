"""Runs of classifier rows, and how they are cut: the rule of torch.chunk, which is DTensor's and FSDP2's."""

Run = tuple[int, int]
"""Rows (start, stop)."""


def even_parts(run: Run, parts: int) -> list[Run]:
    """A run in consecutive parts of ⌈size / parts⌉ rows: the last ones may be short or empty."""
    start, stop = run
    size = -(-(stop - start) // parts)
    return [(min(start + index * size, stop), min(start + (index + 1) * size, stop)) for index in range(parts)]
