"""Solutions of the exercises of notebook 04. The graders are in the notebook."""


def may_see(a, b, side):
    return a[:2] == b[:2] and a[2] // side == b[2] // side and a[3] // side == b[3] // side


def pairs(rows, columns, side):
    down, across = (n // side * side**2 + (n % side) ** 2 for n in (rows, columns))
    return down * across


def angle_of(j, row, column, d):
    pair = j % (d // 2)
    axis, i = divmod(pair, d // 4)
    return (row, column)[axis] * 10_000 ** (-4 * i / d)


def merged(x, rows, columns):
    x = x.view(rows // 2, 2, columns // 2, 2, -1)
    return x.transpose(1, 2).reshape(rows * columns // 4, -1)
