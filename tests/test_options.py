from trl_diffusion_rank.options import did_you_mean


def test_the_most_similar_name_is_offered_and_nothing_where_none_is_similar():
    assert did_you_mean("clp", ["clip", "pickscore", "cli"]) == " Did you mean 'clip'?"
    assert did_you_mean("seeed", iter({"seed": 0}), "; did you mean `{}`?") == "; did you mean `seed`?"
    assert did_you_mean("xyz", ["clip"]) == ""
