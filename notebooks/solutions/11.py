"""Solutions of the exercises of notebook 11. The graders are in the notebook."""


def grown(frames, rate, kernel):
    cut = (kernel - rate) // 2
    return rate * (frames - 1) + kernel - 2 * cut


def ghost(hz, rate):
    doubled = 2 * hz % rate
    return min(doubled, rate - doubled)


def snake(x, alpha, beta):
    a, b = alpha.exp()[:, None], beta.exp()[:, None]
    return x + (a * x).sin().square() / b


def doubled(x):
    finer = []
    for here, after in zip(x, x[1:] + x[-1:]):
        finer += [here, (here + after) / 2]
    return finer


def sees(kernel, dilations):
    side = kernel // 2
    return sum(5 + side * dilation + 5 + side for dilation in dilations)
