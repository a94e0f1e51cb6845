"""Matching of the panel with the vocabulary of the backbone: which genes it has, and their ids."""

import logging
from functools import cached_property
from pathlib import Path

from hinge.backbones.gene_matching import GeneMapping
from hinge.backbones.hgnc import GeneNames, ensembl_id
from hinge.backbones.vocabulary import GeneVocabulary, OnMissing
from hinge.config import BackboneConfig
from hinge.utils.errors import DataError, WeightsError
from hinge.utils.files import write_json

logger = logging.getLogger(__name__)


class GeneMatcher:
    """Matches gene symbols to the vocabulary of a run's backbone.

    Parameters
    ----------
    settings
        The section `backbone` of a configuration.
    weights
        Folder or file of the backbone in use.
    """

    def __init__(self, settings: BackboneConfig, weights: Path):
        self.settings, self.weights = settings, weights

    @cached_property
    def vocabulary(self) -> GeneVocabulary:
        """The vocabulary of the backbone, from `backbone.vocabulary` or else stored with its weights.

        Raises
        ------
        WeightsError
            Neither is there, or the file belongs to other weights.
        """
        # a random backbone has the vocabulary of the weights whose architecture it copies
        source = self.settings.path or self.weights
        from hinge.backbones import read_config  # imports transformers

        vocabulary = read_config(source).read_vocabulary(self.settings.vocabulary)
        if vocabulary is None:
            raise WeightsError(f"the backbone {source} brings no gene vocabulary; name its file as backbone.vocabulary")
        return vocabulary

    def match(self, genes: list[str], on_missing: OnMissing) -> GeneMapping:
        """Map gene symbols to vocabulary ids."""
        table = self.settings.gene_names
        known = self.vocabulary.id_of
        by_ensembl = sum(ensembl_id(name) is not None for name in known) > len(known) / 2
        if table is None and by_ensembl and not any(map(ensembl_id, genes)):
            raise DataError(
                "the backbone knows genes by Ensembl id and the panel names symbols: give HGNC's table of both as "
                "backbone.gene_names"
            )
        return self.vocabulary.match(genes, on_missing, GeneNames(table) if table is not None else None)

    def select(self, genes: list[str], slides: dict[str, list[str]], path: Path) -> list[str]:
        """Return the genes of a panel that the model can use; log and write how panel and slides were matched.

        Parameters
        ----------
        genes
            The panel.
        slides
            Gene symbols of the training slides, by name.
        path
            genes.json to write.
        """
        mapping = self.match(genes, self.settings.unknown_genes)
        dropped = len(genes) - len(mapping.genes)
        end = f"; {dropped} dropped from the panel (backbone.unknown_genes: new keeps them)" if dropped else ""
        logger.info("panel: %s%s", mapping.summary(), end)
        matched = {}
        for name, symbols in slides.items():
            known = self.match(symbols, "drop")
            matched[name] = {"genes": len(symbols), "mapped": len(known.genes), "summary": known.summary()}
            logger.info("%s: %d of %d genes are in the vocabulary", name, len(known.genes), len(symbols))
        report = {
            "vocabulary": str(self.settings.vocabulary or self.weights),
            "panel": {
                "genes": len(genes),
                "mapped": len(mapping.rules),
                "summary": mapping.summary(),
                "harmonised": mapping.harmonised,
                "missing": mapping.missing,
                "duplicates": mapping.duplicates,
                "dropped": [gene for gene in genes if gene not in mapping.genes],
                "new": mapping.new,
            },
            "slides": matched,
        }
        write_json(path, report)
        logger.info("wrote %s", path)
        return mapping.genes
