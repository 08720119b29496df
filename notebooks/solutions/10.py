"""Solutions of the exercises of notebook 10. The graders are in the notebook."""


def seen(i, frames, block, back, ahead):
    own = i // block
    first, last = (own - back) * block, (own + ahead + 1) * block - 1
    return [max(first, 0), min(last, frames - 1)]


def heun_step(field, y, start, end):
    h = end - start
    first = field(start, y)
    second = field(end, y + h * first)
    return y + h * (first + second) / 2


def best(x, t, ends):
    noises = (x - t * ends) / (1 - t)
    shares = (-noises.square() / 2).softmax(0)
    return (shares * (ends - noises)).sum()
