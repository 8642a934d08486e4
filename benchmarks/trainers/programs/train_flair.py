"""flair: classifies short texts."""

import flair
from flair.data import Corpus, Dictionary, Sentence
from flair.datasets import FlairDatapointDataset
from flair.embeddings import DocumentRNNEmbeddings, OneHotEmbeddings
from flair.models import TextClassifier
from flair.trainers import ModelTrainer

flair.set_seed(0)
flair.device = "cpu"
moods = {"good": ["fine", "great", "lovely"], "bad": ["poor", "awful", "dull"]}
things = ["film", "book", "song", "meal", "walk", "room", "view"]
sentences = []
for mood, words in moods.items():
    for word in words:
        for thing in things:
            sentences.append(Sentence(f"a {word} {thing}"))
            sentences[-1].add_label("mood", mood)
corpus = Corpus(FlairDatapointDataset(sentences), FlairDatapointDataset(sentences[::5]), sample_missing_splits=False)

vocabulary = Dictionary()
for word in ["a", *moods["good"], *moods["bad"], *things]:
    vocabulary.add_item(word)
embeddings = DocumentRNNEmbeddings([OneHotEmbeddings(vocabulary, embedding_length=16)], hidden_size=16)
model = TextClassifier(embeddings, label_dictionary=corpus.make_label_dictionary("mood"), label_type="mood")
plugins = []
# --- watch here ---
trainer = ModelTrainer(model, corpus)
trainer.train("trained", learning_rate=0.1, mini_batch_size=4, max_epochs=3, save_final_model=False, plugins=plugins)
print(model.forward_loss(sentences)[0].item() / len(sentences))
