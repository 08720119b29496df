"""Solutions of the exercises of notebook 15. The graders are in the notebook."""


def cache_weighs(layers, heads, shared, size, tokens):
    return 2 * layers * shared * size * tokens * 2


def pass_ms(weights, words, gb_s, tflop_s):
    fetch = 2 * weights / (gb_s * 1e9)
    count = 2 * weights * words / (tflop_s * 1e12)
    return 1000 * max(fetch, count)


def problems(wanted, stored):
    both = wanted.keys() & stored.keys()
    return [sorted(wanted.keys() - both), sorted(stored.keys() - both),
            sorted(name for name in both if wanted[name] != stored[name])]
