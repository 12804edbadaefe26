# SPDX-License-Identifier: Apache-2.0
"""Parts of a module are reached and replaced by dotted names, by whichever import, and keep their modes."""

import pytest
from torch import nn

from deepspeed.compression import helper
from deepspeed.utils import module, module_utils


def model():
    return nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"a": nn.Linear(2, 1)}))


@pytest.mark.parametrize("home", [module_utils, module, helper])
def test_dotted_names_reach_and_replace(home):
    whole = model()
    assert home.recursive_getattr(whole, "1.a.weight") is whole[1]["a"].weight
    fresh = nn.Linear(3, 3)
    home.recursive_setattr(whole, "1.a", fresh)
    assert whole[1]["a"] is fresh
    home.recursive_setattr(whole, "0", fresh)
    assert whole[0] is fresh


@pytest.mark.parametrize("name", ["1.b", "5", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(AttributeError):
        module_utils.recursive_getattr(model(), name)


class Merging(nn.Linear):
    """Folds something into its weight for evaluation, as adapters do."""

    merged = False

    def train(self, mode=True):
        self.merged = not mode
        return super().train(mode)


@pytest.mark.parametrize("training", [True, False])
def test_each_part_goes_back_to_its_own_mode_by_its_own_train(training):
    whole = nn.Sequential(nn.Sequential(Merging(2, 2), Merging(2, 2)), nn.Dropout()).train(training)
    whole[0][1].train(not training)
    before = [part.training for part in whole.modules()]
    with pytest.raises(KeyError), module_utils.evaluating(whole):
        assert not any(part.training for part in whole.modules())
        assert whole[0][0].merged and whole[0][1].merged
        raise KeyError
    assert [part.training for part in whole.modules()] == before
    assert (whole[0][0].merged, whole[0][1].merged) == (not training, training)
