"""What a recurrent module reads in place of its data, in words."""

from __future__ import annotations

from gradwatch.values.report import Explanation, Finding


def explain_padding(finding: Finding) -> Explanation:
    """Say that padding is read in place of the data."""
    evidence, since = finding.evidence, "" if finding.onset is None else f", since step {finding.onset}"
    return Explanation(
        f"what is read of {finding.place or 'the model'} is its padding: in a typical row the last"
        f" {evidence['padding']:.0f} of {evidence['length']:.0f} timesteps are all the same, and the data before them"
        f" gets {evidence['data']:.1g} of their gradient{since}",
        "the rows are padded at their ends, and the output is taken at the end of the padding",
        "pack the rows (torch.nn.utils.rnn.pack_padded_sequence), or take the output of each at the last timestep of"
        " its data, or put the padding in front",
    )


def explain_over_batch(finding: Finding) -> Explanation:
    """Say that the rows of the batch are taken for timesteps."""
    name, length = finding.place or "the model", finding.evidence["length"]
    since = "" if finding.onset is None else f", since step {finding.onset}"
    if "mixed" in finding.evidence:
        return Explanation(
            f"{name} mixes the rows of a batch up: the data of a row moves the newest outputs of other rows"
            f" {finding.evidence['mixed']:.1g} times as much as its own moves one of theirs{since}",
            "a view() or reshape() stands where a transposition or permutation of dimensions is meant, so that entries"
            " of one row come into another; or something goes along the batch (attention, a sum, a softmax over"
            " dimension 0)",
            "transpose or permute in place of view, and check the dimension of each sum, softmax and attention; where"
            ' rows are meant to know of each other, timesteps={"x": 1} names time in x, and this is not asked',
        )
    return Explanation(
        f"{name} runs over the batch: the model's output has a row for each of its {length:.0f} timesteps, and none for"
        f" its rows{since}",
        "it takes the first dimension of its input for time (batch_first=False), and that is the batch",
        f"set batch_first=True in {name}, or transpose (not view) what goes into it",
    )


def explain_unused(finding: Finding) -> Explanation:
    """Say that of a recurrence one timestep is read."""
    name, direction = finding.place or "the model", finding.names["direction"]
    which = f"the {direction} direction of {name}" if direction else name
    return Explanation(
        f"one of {finding.evidence['length']:.0f} timesteps is read by {which}: its recurrent weights"
        f" ({finding.names['weights']}) have had a gradient of exactly 0 since step {finding.onset}",
        "its output is taken at the last timestep, which the reverse direction reads first"
        if direction == "reverse"
        else "its output is taken at the first timestep alone",
        "take the last state of each direction, torch.cat([h_n[-2], h_n[-1]], 1), or a mean or maximum over time"
        if direction
        else "take its output at the last timestep, its last state, or a mean or maximum over time",
    )
