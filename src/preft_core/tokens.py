"""Which tokens of a forward pass are prefill. Position decides, never the shape of the pass."""


def prefill_span(first_position: int, num_tokens: int, prompt_length: int, start: int = 0) -> tuple[int, int]:
    """Returns the half-open range of rows, within one forward of one request, that an adapter applies to.

    Row i holds the token at position `first_position + i` and is adapted iff

        start <= first_position + i < prompt_length

    so a chunk of a prompt is adapted whole, a speculative verification after the prompt not at all, and a forward
    that recomputes prompt and generated tokens together is adapted up to the prompt's end.

    Args:
        first_position: position of the first row in its request, tokens, >= 0; padding counts as tokens
        num_tokens: rows in this forward, >= 0
        prompt_length: tokens of the request's prompt, >= 0
        start: first adapted position, tokens; 0 adapts the whole prompt
    Returns:
        (begin, end) with 0 <= begin <= end <= num_tokens; begin == end when nothing is adapted.
    Raises:
        ValueError: a negative argument.
    Source: arXiv 2605.14217, section 3; the window's start is ours.
    """
    arguments = {
        "first_position": first_position,
        "num_tokens": num_tokens,
        "prompt_length": prompt_length,
        "start": start,
    }
    negative = [f"{name} is {value}" for name, value in arguments.items() if value < 0]
    if negative:
        raise ValueError(f"{', '.join(negative)}: positions and counts of tokens are 0 or more")
    end = min(max(prompt_length - first_position, 0), num_tokens)
    begin = min(max(start - first_position, 0), end)
    return begin, end
