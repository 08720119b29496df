"""Solutions of the exercises of notebook 03. The graders are in the notebook."""


def byte_of(value, mean, spread):
    return round((value * spread + mean) * 255)


def column_of(color, frame, y, x):
    return ((color * 2 + frame) * 14 + y) * 14 + x


def row_of(y, x, width):
    cell = y // 28 * (width // 28) + x // 28
    inside = y % 28 // 14 * 2 + x % 28 // 14
    return 4 * cell + inside


def film_tokens(seconds, rate, height, width):
    wanted = min(max(2 * seconds, 4), 768, seconds * rate)
    return int(wanted) // 2 * (height // 28) * (width // 28)


def halved(weight):
    return weight.view(-1, 3, 2, 196).sum(2).flatten(1)
