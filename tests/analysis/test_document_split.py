"""split_documents: no document on both sides, as many sequences as were asked for or as few less as documents give."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from layerskip_moe.analysis.document_split import one_of_each, split_documents


@given(documents=st.lists(st.integers(0, 12), min_size=2, max_size=40), data=st.data(), seed=st.integers(0, 5))
def test_documents_stay_whole_unless_each_is_too_large(documents, data, seed):
    count = data.draw(st.integers(1, len(documents) - 1))
    drawn, rest = split_documents(documents, count, seed)
    assert sorted(drawn + rest) == list(range(len(documents)))
    sizes = Counter(documents)
    ours, theirs = {documents[index] for index in drawn}, {documents[index] for index in rest}
    if min(sizes.values()) > count:
        assert len(drawn) == count
    else:
        assert not ours & theirs
        left = count - len(drawn)
        assert 0 <= left < min((sizes[number] for number in theirs), default=count + 1)  # no other would have fitted
    assert (drawn, rest) == split_documents(documents, count, seed)


def test_documents_of_one_sequence_each_are_drawn_by_the_seed():
    splits = [split_documents(range(20), 5, seed) for seed in (0, 1)]
    assert [len(drawn) for drawn, _ in splits] == [5, 5] and splits[0] != splits[1]


def test_one_of_each_is_the_first():
    assert one_of_each([7, 3, 7, 3, 5], [3, 0, 1, 2, 4]) == [3, 0, 4]
