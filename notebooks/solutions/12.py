"""Solutions of the exercises of notebook 12. The graders are in the notebook."""


def words_needed(blocks, ahead, frames, repeats):
    return (blocks + ahead) * frames // repeats + 1


def must_wait(arrivals, lengths):
    due, wait = arrivals[0], 0
    for arrival, length in zip(arrivals, lengths):
        wait = max(wait, arrival - due)
        due += length
    return wait


def hold_back(words, rate, eaten):
    return max(0, words / rate - words / eaten)


def cuts(schedule, total):
    ends, done = [], 0
    while True:
        blocks, ahead = schedule[min(len(ends), len(schedule) - 1)]
        if done + blocks + ahead > total:
            return ends + [total] if done < total else ends
        done += blocks
        ends.append(done)
