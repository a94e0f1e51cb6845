"""Gene vocabularies: the formats they come in, and the rules by which genes find their ids."""

import gzip
import os
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hinge.backbones.hgnc import GeneNames
from hinge.backbones.vocabulary import GeneVocabulary
from hinge.utils.errors import ConfigError, DataError, WeightsError

# a few lines as HGNC's complete set has them (columns in another order)
HGNC = """hgnc_id\tsymbol\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id
HGNC:1\tYARS1\tApproved\t"tyrRS|CMTDIC"\tYARS\tENSG00000134684
HGNC:2\tAIRIM\tApproved\t\tC1orf109\tENSG00000116922
HGNC:3\tINTS11\tApproved\t"RC-68|INT11"\tCPSF3L\tENSG00000127054
HGNC:4\tTLE5\tApproved\t"GRG|GRG5"\tAES\tENSG00000104964
HGNC:5\tOLD\tEntry Withdrawn\t\tWITHDRAWN\tENSG00000000001
HGNC:6\tTWIN1\tApproved\tTWINALIAS\tTWIN\tENSG00000000011
HGNC:7\tTWIN2\tApproved\tTWINALIAS\tTWIN\tENSG00000000012
HGNC:8\tMPP3\tApproved\t\tDLG3\tENSG00000161647
HGNC:9\tDLG3\tApproved\t\t\tENSG00000082458
"""


@pytest.fixture
def names(tmp_path) -> GeneNames:
    path = tmp_path / "hgnc.txt"
    path.write_text(HGNC)
    return GeneNames(path)


@pytest.fixture(scope="module")
def cellfm() -> Path:
    folder = Path(os.environ.get("HINGE_CELLFM", ROOT.parent / "shared" / "cellfm"))
    if not folder.is_dir():
        pytest.skip(f"no {folder}; set HINGE_CELLFM")
    return folder


def load(tmp_path: Path, text: str, name: str = "genes.csv") -> GeneVocabulary:
    (tmp_path / name).write_bytes(text.encode())
    return GeneVocabulary.load(tmp_path / name)


# -- formats -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "A\nNA\nC\n",  # a list; NA is a name like any other
        "gene\nA\nNA\nC\n",
        "\ufeffA\r\nNA\r\n\r\nC",
        "A,1\nNA,2\nC,3\n",
        ",idx\nC,3\nNA,2\nA,1\n",  # genemap.csv
        "x\ty\nA\t1\nNA\t2\nC\t3\n",
        "HGNC_gene,frequency,biotype\nA,7,\nNA,8,rna\nC,9,\n",  # expand_gene_info.csv
        ",symbol,token\n0,C,3\n1,A,1\n2,NA,2\n",
        ",gene_name\n0,A\n1,NA\n2,C\n",
    ],
)
def test_formats(tmp_path, text):
    vocabulary = load(tmp_path, text)
    assert vocabulary.genes == ["A", "NA", "C"]
    assert vocabulary.id_of == {"A": 1, "NA": 2, "C": 3}
    assert vocabulary.ids(["C", "A"]).tolist() == [3, 1]
    assert vocabulary.ids(["C", "A"]).dtype == np.int64


def test_save_and_load(tmp_path):
    table = load(tmp_path, "symbol\tensembl_gene_id\nA\tENSG00000000001.4\nB\t\nC\tENSG00000000003\n", "g.tsv")
    again = GeneVocabulary.load(table.save(tmp_path / "folder" / "vocabulary.json"))
    assert again == table
    assert again.ensembl == {"ENSG00000000001": 1, "ENSG00000000003": 3}


@pytest.mark.parametrize(("n", "rows"), [(1, 8), (7, 8), (8, 16), (27855, 27856), (27852, 27856), (24078, 24080)])
def test_rows_of_the_embedding_table(n, rows):
    vocabulary = GeneVocabulary.from_genes(f"G{k}" for k in range(n))
    assert (vocabulary.n_genes, vocabulary.n_embeddings) == (n, rows)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no rows"),
        ("A\nB\nA\n", "'A' twice"),
        ("A,1\nB,0\n", "as its id, not 0"),
        ("A,1\nB,-5\n", "as its id, not -5"),
        ("A,1\nB,99999999999\n", "from 1 to"),
        ("A,1\nB,two\nC,3\n", "'B' needs a whole number as its id, not 'two'"),
        ("A,x,y\nB,x,y\n", "must name the columns"),
        ("symbol,id\nA,1,3\n", "gene 1 has 3 columns"),
        ("symbol,id\n,1\n", "needs a symbol"),
        ("0\n1\n2\n", "needs a symbol, not '0'"),
        ("symbol\n", "at least one gene"),
    ],
)
def test_damaged_tables(tmp_path, text, message):
    with pytest.raises(WeightsError, match=message) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "genes.csv") in str(caught.value)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"genes": {"A": "1"}, "ensembl": {}}', '{"genes": {"A": true}, "ensembl": {}}']
)
def test_damaged_json(tmp_path, text):
    with pytest.raises(WeightsError, match=r"genes\.json"):
        load(tmp_path, text, "genes.json")


def test_files_that_are_no_tables(tmp_path):
    with pytest.raises(WeightsError, match="No such file"):
        GeneVocabulary.load(tmp_path / "none.csv")
    (tmp_path / "binary.csv").write_bytes(bytes(range(256)))
    with pytest.raises(WeightsError, match=r"binary\.csv"):
        GeneVocabulary.load(tmp_path / "binary.csv")
    (tmp_path / "hgnc.txt").write_text("A\nB\n")
    with pytest.raises(DataError, match="not a tab-separated HGNC table"):
        GeneNames(tmp_path / "hgnc.txt")
    with pytest.raises(DataError, match="No such file"):
        GeneNames(tmp_path / "none.txt")


# -- the rules ---------------------------------------------------------------------------------------------


def test_case():
    vocabulary = GeneVocabulary.from_genes(["C1orf159", "Twin", "TWIN", "ACTB"])
    mapping = vocabulary.match(["C1ORF159", "ACTB", "twin", "AL109927.1"])
    assert mapping.genes == ["C1ORF159", "ACTB"]
    assert mapping.ids.tolist() == [1, 4]
    assert mapping.index.tolist() == [0, 1]
    assert mapping.harmonised == {"C1ORF159": "C1orf159"}
    assert mapping.missing == ["twin", "AL109927.1"]  # in two cases: no match


def test_symbols_that_share_an_id_are_one_gene():
    vocabulary = GeneVocabulary({"C1orf109": 1, "AIRIM": 1, "B": 2})
    assert vocabulary.n_genes == 2
    mapping = vocabulary.match(["B", "AIRIM", "C1orf109"])
    assert mapping.genes == ["B", "AIRIM"]
    assert mapping.duplicates == {"C1orf109": "AIRIM"}


def test_ensembl_ids_of_the_vocabulary(tmp_path):
    text = "symbol,ensembl_id\nA,ENSG00000000001.4\nB,ENSG00000000002\n"
    vocabulary = load(tmp_path, text)
    mapping = vocabulary.match(["ENSG00000000002.11", "ensg00000000001", "ENSG00000000002_PAR_Y"])
    assert mapping.ids.tolist() == [2, 1]
    assert set(mapping.rules.values()) == {"Ensembl id"}
    assert mapping.missing == ["ENSG00000000002_PAR_Y"]
    by_id = GeneVocabulary.from_genes(["ENSG00000000001.4", "ENSG00000000002.1"])
    assert by_id.match(["ENSG00000000002.7", "ENSG00000000001.4"]).ids.tolist() == [2, 1]


def test_clone_names_keep_their_version():
    vocabulary = GeneVocabulary.from_genes(["AL109927.1", "AL109927.2"])
    assert vocabulary.match(["AL109927.2", "AL109927.3"]).missing == ["AL109927.3"]


def test_previous_symbols_in_both_directions_and_aliases(names):
    vocabulary = GeneVocabulary.from_genes(["YARS1", "C1orf109", "INTS11", "TLE5"])
    mapping = vocabulary.match(["INT11", "AIRIM", "Yars", "ENSG00000104964.3"], names=names)
    assert mapping.harmonised == {
        "INT11": "INTS11",
        "AIRIM": "C1orf109",
        "Yars": "YARS1",
        "ENSG00000104964.3": "TLE5",
    }
    assert mapping.rules == {
        "INT11": "alias",
        "AIRIM": "previous symbol",
        "Yars": "previous symbol",
        "ENSG00000104964.3": "Ensembl id",
    }
    assert mapping.ids.tolist() == [3, 2, 1, 4]
    assert vocabulary.match(["YARS1", "AIRIM"]).missing == ["AIRIM"]
    by_id = GeneVocabulary.from_genes(["ENSG00000104964", "ENSG00000116922"])
    assert by_id.match(["C1orf109", "TLE5"], names=names).ids.tolist() == [2, 1]


def test_names_of_two_genes_match_nothing(names):
    vocabulary = GeneVocabulary.from_genes(["TWIN1", "TWIN2", "A"])
    assert vocabulary.match(["A", "TWIN", "TWINALIAS"], names=names).missing == ["TWIN", "TWINALIAS"]
    # nor does the old name of two genes in the vocabulary stand for either
    assert GeneVocabulary.from_genes(["TWIN", "A"]).match(["A", "TWIN1"], names=names).missing == ["TWIN1"]


def test_a_name_in_use_means_its_holder_today(names):
    # MPP3 was once called DLG3, which is now another gene
    vocabulary = GeneVocabulary.from_genes(["MPP3", "A"])
    assert vocabulary.match(["A", "DLG3"], names=names).missing == ["DLG3"]
    vocabulary = GeneVocabulary.from_genes(["DLG3", "A"])
    assert vocabulary.match(["A", "MPP3"], names=names).missing == ["MPP3"]


def test_withdrawn_entries_are_not_read(names):
    vocabulary = GeneVocabulary.from_genes(["OLD", "A"])
    assert vocabulary.match(["A", "WITHDRAWN"], names=names).missing == ["WITHDRAWN"]


def test_custom_downloads_of_hgnc(tmp_path):
    path = tmp_path / "updated_hgcn.tsv"
    path.write_text(
        "HGNC ID\tApproved symbol\tStatus\tPrevious symbols\tAlias symbols\tEnsembl gene ID\n"
        "HGNC:1\tYARS1\tApproved\tYARS, YRS9\ttyrRS\tENSG00000134684\n"
    )
    names = GeneNames(path)
    assert names.approved("YRS9") == ("YARS1", "previous symbol")
    assert names.approved("TYRRS") == ("YARS1", "alias")
    assert names.approved("ENSG00000134684") == ("YARS1", "Ensembl id")
    assert names.approved("other") is None


def test_the_surest_match_keeps_the_id(names):
    vocabulary = GeneVocabulary.from_genes(["YARS1", "TLE5"])
    mapping = vocabulary.match(["YARS", "GRG", "yars1", "YARS1", "AES"], names=names)
    assert mapping.genes == ["YARS1", "AES"]
    assert mapping.duplicates == {"YARS": "YARS1", "GRG": "AES", "yars1": "YARS1"}
    assert mapping.index.tolist() == [3, 4]
    assert mapping.summary() == (
        "2 of 5 genes map: 1 by symbol, 1 by previous symbol; "
        "3 under two names: YARS (as YARS1), GRG (as AES), yars1 (as YARS1)"
    )


# -- what becomes of the others ----------------------------------------------------------------------------


def test_new_genes_come_after_the_last_id(names):
    vocabulary = GeneVocabulary.from_genes(["A", "YARS1", "C"])
    mapping = vocabulary.match(["X", "C", "YARS", "YARS1", "Y"], on_missing="new", names=names)
    assert mapping.genes == ["X", "C", "YARS", "YARS1", "Y"]
    assert mapping.ids.tolist() == [4, 3, 5, 2, 6]
    assert mapping.new == ["X", "YARS", "Y"]
    assert mapping.missing == ["X", "Y"]
    wider = vocabulary.extended(mapping.new)
    assert wider.ids(mapping.genes).tolist() == mapping.ids.tolist()
    assert wider.n_genes == 6
    assert mapping.summary().endswith("3 get new embeddings")
    with pytest.raises(DataError, match="has A already"):
        vocabulary.extended(["A"])


def test_missing_genes_can_be_refused():
    vocabulary = GeneVocabulary.from_genes(["A", "B"])
    assert vocabulary.match(["B", "A"], on_missing="error").ids.tolist() == [2, 1]
    message = r"1 of 8 genes map: 1 by symbol; 7 not in the vocabulary: G0, G1, G2, G3, G4 and 2 more"
    with pytest.raises(DataError, match=message):
        vocabulary.match(["A", *(f"G{k}" for k in range(7))], on_missing="error")
    with pytest.raises(DataError, match="2 of 3 genes are not in the vocabulary: a, X"):
        vocabulary.ids(["a", "B", "X"])
    with pytest.raises(DataError, match="no gene is in the vocabulary"):
        vocabulary.match(["X"])
    with pytest.raises(DataError, match="'A' twice"):
        vocabulary.match(["A", "A"])
    with pytest.raises(DataError, match="must be names, not nan"):
        vocabulary.match(["A", float("nan")])
    with pytest.raises(ConfigError, match="drop, error or new"):
        vocabulary.match(["A"], on_missing="skip")


symbols = st.lists(st.text("aAbB.1", min_size=1, max_size=3), min_size=1, max_size=12, unique=True)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(known=symbols, asked=symbols)
def test_no_two_genes_share_an_id(names, known, asked):
    vocabulary = GeneVocabulary.from_genes(known)
    mapping = vocabulary.match(asked, on_missing="new", names=names)
    assert mapping.genes == asked
    assert len(set(mapping.ids.tolist())) == len(asked)
    assert sorted([*mapping.rules, *mapping.missing, *mapping.duplicates]) == sorted(asked)
    for gene, number in zip(mapping.genes, mapping.ids.tolist(), strict=True):
        if gene in vocabulary.id_of:
            assert number == vocabulary.id_of[gene]
            assert mapping.rules[gene] == "symbol"
        elif gene in mapping.rules:
            assert vocabulary.genes[number - 1].upper() == gene.upper()
        else:
            assert number > len(known)
    if mapping.rules:
        kept = vocabulary.match(asked, names=names)
        assert kept.genes == [asked[k] for k in kept.index]
        assert set(kept.ids.tolist()) == {k for k in mapping.ids.tolist() if k <= len(known)}


# -- CellFM's own files and a real slide -------------------------------------------------------------------


@pytest.mark.full
def test_cellfm_vocabularies(cellfm):
    expanded = GeneVocabulary.load(cellfm / "expand_gene_info.csv")
    assert (expanded.n_genes, expanded.n_embeddings) == (27855, 27856)
    assert expanded.ids(["A1BG", "A1BG-AS1", "ZZZ3"]).tolist() == [1, 2, 27855]
    first = GeneVocabulary.load(cellfm / "gene_info.csv")
    assert (first.n_genes, first.n_embeddings) == (24078, 24080)
    # as many embeddings as the expanded list and all its symbols, but other ids
    mapped = GeneVocabulary.load(cellfm / "genemap.csv")
    assert (mapped.n_genes, mapped.n_embeddings) == (27852, 27856)
    assert mapped.id_of["AIRIM"] == mapped.id_of["C1orf109"] == expanded.id_of["C1orf109"]
    assert mapped.id_of["ZZZ3"] == expanded.id_of["ZZZ3"] - 3


@pytest.mark.real
def test_her2st_genes_in_cellfm(cellfm, her2st, names):
    with gzip.open(her2st / "data" / "ST-cnts" / "C2.tsv.gz", "rt") as file:
        genes = file.readline().rstrip("\n").split("\t")[1:]
    vocabulary = GeneVocabulary.load(cellfm / "expand_gene_info.csv")
    plain = vocabulary.match(genes)
    assert plain.summary().startswith("14,910 of 15,706 genes map: 14,910 by symbol; 796 not in the vocabulary")
    assert np.array_equal(plain.ids, vocabulary.ids(plain.genes))
    mapping = vocabulary.match(genes, names=names)
    assert {gene: mapping.harmonised[gene] for gene in ("YARS", "CPSF3L", "AES")} == {
        "YARS": "YARS1",
        "CPSF3L": "INTS11",
        "AES": "TLE5",
    }
    assert len(mapping.genes) == len(plain.genes) + 3
