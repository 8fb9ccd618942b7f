"""CARDs and their decks: exact counts, rewinding, augmentations, binary weights, the mean and the gate."""
import pytest
import torch
from torch import nn

from sparselab.learn import Config, load, to_float, train
from sparselab.learn.assembly import in_turn
from sparselab.learn.data import epoch_generator
from sparselab.learn.decks import AUGMENTATIONS, Deck, SpectralGate, card_names, spectra

SMALL = {"model": "mlp", "model_options": {"widths": [30]}, "method": "card", "sparsity": 0.8, "epochs": 1, "eps": 0.0, "objective": "natural",
         "init": "kaiming", "train_samples": 300, "test_samples": 50}


def deck_of(tmp_path, **options):
    rate = {"rate": 0.8} if options.get("recipe", "lrr") in ("lrr", "lth") else {}
    return train(Config(**SMALL, runs_dir=str(tmp_path), method_options=rate | options), [])


@pytest.mark.parametrize("recipe", ["lrr", "lth", "edge_popup", "biprop"])
def test_every_card_has_the_exact_count_and_its_own_seed_and_images(tmp_path, recipe):
    run = deck_of(tmp_path, recipe=recipe, augmentations=["clean", "clean", "blur"])
    rounds = {each.path.name: each for each in run.rounds}
    cards = [rounds[name] for name in card_names(["clean", "clean", "blur"])[:2]] + [run]
    assert all(card.summary["nnz"] == round(0.2 * card.summary["total"]) for card in cards)
    assert len({card.weights["fc1.weight"].sum().item() for card in cards}) == 3
    assert len(run.summary["ensemble"]["members"]["accuracy"]) == 3 and run.summary["augmentations"] == ["clean", "clean", "blur"]
    assert run.summary["flops"]["training"] > sum(each.summary["flops"]["training"] for each in run.rounds)
    if recipe in ("lrr", "lth"):
        assert sorted(rounds) == ["00-clean", "00-clean-00", "01-clean", "01-clean-00", "02-blur-00"]
    else:
        assert sorted(rounds) == ["00-clean", "01-clean"]
    kept = run.weights["fc1.weight"][run.history.mask(-1, "fc1.weight")].abs()
    assert (len(kept.unique()) == 1) == (recipe == "biprop")


@pytest.mark.parametrize("recipe", ["lrr", "edge_popup"])
def test_the_augmentation_of_a_card_reaches_all_of_its_trainings(tmp_path, recipe):
    """Of two decks of one seed that differ in the augmentation alone."""
    clean, blurred = (deck_of(tmp_path, recipe=recipe, augmentations=[name]) for name in ("clean", "blur"))
    assert len(clean.rounds) == (1 if recipe == "lrr" else 0)
    for one, other in zip([*clean.rounds, clean], [*blurred.rounds, blurred], strict=True):
        assert not torch.equal(one.weights["fc1.weight"], other.weights["fc1.weight"])


def test_two_augmentations_come_one_after_the_other():
    plus, twice = (lambda images, generator: images + 1), (lambda images, generator: images * 2)
    assert in_turn(plus, twice)(3, None) == 8 and in_turn(twice, plus)(3, None) == 7
    assert in_turn(None, plus) is plus and in_turn(plus, None) is plus and in_turn(None, None) is None


def test_at_sparsity_0_the_deck_is_dense(tmp_path):
    run = train(Config(**SMALL | {"sparsity": 0.0}, runs_dir=str(tmp_path), method_options={"augmentations": ["clean", "contrast"]}), [])
    assert run.summary["nnz"] == run.summary["total"] and [each.path.name for each in run.rounds] == ["00-clean"]


def test_a_deck_is_the_mean_of_its_cards_and_the_gate_picks_among_them(tmp_path):
    run = deck_of(tmp_path, augmentations=["clean", "blur", "blur"])
    deck, data = Deck.of(run), load("digits")
    x = to_float(data.test.images[:50])
    each = torch.stack([card(x).softmax(1) for card in deck.cards])
    assert torch.allclose(deck(x), each.mean(0)) and torch.allclose(deck(x).sum(1), torch.ones(50))
    accuracy = float((deck(x).argmax(1) == data.test.labels[:50]).double().mean())
    assert accuracy == run.summary["ensemble"]["accuracy"]
    blurred = to_float(AUGMENTATIONS["blur"](data.test.images, epoch_generator(1, 0)))
    expected = torch.stack([card(blurred).softmax(1) for card in deck.cards[1:]]).mean(0)
    assert deck.gate(blurred) == "blur" and torch.allclose(deck.gated(blurred), expected)
    with pytest.raises(ValueError, match="made by the method 'card'"):
        Deck.of(run.rounds[0])


@pytest.mark.parametrize("name", [name for name in AUGMENTATIONS if AUGMENTATIONS[name]])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 32, 32)])
def test_augmentations_keep_shape_and_type_and_follow_the_generator(name, shape):
    images = torch.randint(0, 256, (20, *shape), dtype=torch.uint8)
    one, same, other = (AUGMENTATIONS[name](images, epoch_generator(seed, 0)) for seed in (0, 0, 1))
    assert one.shape == images.shape and one.dtype == torch.uint8
    assert torch.equal(one, same) and not torch.equal(one, other) and not torch.equal(one, images)
    if name != "gaussian":
        spread = [x.double().flatten(1).std(1) for x in (one, images)]
        assert bool((spread[0] <= spread[1] + 1).all()), "blur and less contrast bring values together"


def test_the_spectrum_of_waves():
    along = torch.arange(16)
    for periods in (1, 3, 6):
        wave = torch.cos(2 * torch.pi * periods * along / 16).expand(1, 3, 16, 16)
        found = spectra(wave)[0]
        assert found.argmax() == periods and found.shape == (8,)
    assert spectra(torch.full((1, 1, 16, 16), 0.5)).abs().max() < 1e-6


@pytest.mark.parametrize(("names", "sentence"), [(["fogg"], "augmentation of a card called 'fogg'"), ([], "list of names"),
                                                 ("clean", "list of names, .* got 'clean'"), ([["clean"]], "augmentation of a card called")])
def test_a_gate_and_a_deck_of_what_is_no_augmentation_are_refused(names, sentence):
    images = load("digits").train.images
    with pytest.raises(ValueError, match=sentence):
        SpectralGate(images, names)
    with pytest.raises(ValueError, match=sentence):
        Deck([], names, SpectralGate(images, ["clean"]))
    with pytest.raises(ValueError, match="an augmentation for each card; got 2 cards and clean"):
        Deck([nn.Flatten(), nn.Flatten()], ["clean"], SpectralGate(images, ["clean"]))


def test_the_gate_is_seeded():
    images = load("digits").train.images
    one, same, other = (SpectralGate(images, ["clean", "gaussian"], seed=seed) for seed in (3, 3, 4))
    x = to_float(images[:100])
    assert one.scores(x) == same.scores(x) != other.scores(x)


@pytest.mark.parametrize(("options", "sentence"), [
    ({"recipe": "lottery"}, "recipe of cards called 'lottery'"), ({"augmentations": ["blurr"]}, "Did you mean 'blur'"),
    ({"augmentations": "blur"}, "list of names"), ({"augmentations": []}, "list of names"), ({"mask_lr": 1.0}, "the recipe is 'lrr'"),
    ({"rewind_epochs": 1}, "rewind_epochs is 0"), ({"rewind": "weights"}, "option of method card"), ({"rate": 0}, "rate above 0"),
    ({"recipe": "biprop", "mask_lr": -1.0}, "mask_lr is a number above 0; got -1.0"),
    ({"augmentations": 2}, "augmentations is a list of names, .* got 2"), ({"augmentations": [["clean"]]}, "augmentation of a card called"),
    ({"recipe": "edge_popup", "rate": 0.5}, "rate: of the recipes lrr and lth, .* the recipe is 'edge_popup'"),
    ({"recipe": "biprop", "rewind_epochs": 1}, "rewind_epochs: of the recipes lrr and lth")])
def test_what_no_deck_can_be_is_a_sentence_and_writes_nothing(tmp_path, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        train(Config(**SMALL, runs_dir=str(tmp_path / "runs"), method_options=options), [])
    assert not (tmp_path / "runs").exists()
