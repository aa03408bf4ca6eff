"""The archives of WMT14 in small: their real names and layout, a few sentences each."""

import gzip
import hashlib
import io
import pathlib
import tarfile
import zipfile

from tensorflow_datasets.core.download import checksums

STATMT = "http://www.statmt.org"
LANGUAGES = ("cs", "de", "fr", "hi", "ru")
NASTY = ["a\rb", "CR\r", "a\u2028b", "a\u0085b", "\ufeffb", " ", "tab\tb", "&amp; \\", "日本 é 😀", "||| x"]
WORDS = "house tree river old new red seven stone glass bread water light".split()


def sentences(corpus, language, count):
    """Sentences of a corpus: equal ones do not occur twice, and equal numbers are translations."""
    rows = [f"{language} {corpus} {row} {WORDS[row % 12]} {WORDS[row * 7 % 11]}" for row in range(count)]
    return [f"{text} {language}" for text in NASTY] + ["", *rows]


def plain(lines):
    return "".join(f"{line}\n" for line in lines).encode()


def sgm(lines):
    """The layout of newstest2014, with what is no XML, indented segments and other line ends."""
    text = '<refset setid="newstest2014" srclang="any" trglang="xx">\n<doc docid="1" origlang="en">\n<p>\n'
    for number, line in enumerate(lines, 1):
        text += f'<seg id="{number}">{line}</seg>' + ("\r\n" if number % 3 == 0 else "\n")
    return (text + '</p> & <\n  <seg id="99">indented</seg>\n</doc>\n</refset>\n').encode()


def tar(members):
    """A tar, gzip-compressed by the caller if it is to be; folders come as members of their own."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            if folder := name.rpartition("/")[0]:
                entry = tarfile.TarInfo(folder)
                entry.type = tarfile.DIRTYPE
                archive.addfile(entry)
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def tgz(members):
    return gzip.compress(tar(members), 1, mtime=0)


def both(template, corpus, count, languages):
    """A file for each side of each pair of languages."""
    return {
        template.format(src=source, side=side): plain(sentences(f"{corpus}-{source}", side, count))
        for source in languages
        for side in (source, "en")
    }


def dev():
    members = both("dev/newstest2013.{side}", "newstest2013", 12, [])
    for side in (*LANGUAGES, "en"):
        members[f"dev/newstest2013.{side}"] = plain(sentences("newstest2013", side, 12))
    for side in ("hi", "en"):
        members[f"dev/newsdev2014.{side}"] = plain(sentences("newsdev2014", side, 9))
    for source in LANGUAGES:
        lines = [sentences(f"newstest2014-{source}", side, 8)[6:] for side in (source, "en")]
        members[f"dev/newstest2014-{source}en-src.{source}.sgm"] = sgm(lines[0])
        members[f"dev/newstest2014-{source}en-ref.en.sgm"] = sgm(lines[1])
    return members


def wiki(source):
    sides = zip(sentences("wiki", source, 7)[10:], sentences("wiki", "en", 7)[10:], strict=True)
    return "".join(f"{one} ||| {other}\n" for one, other in sides).encode()


def manual():
    """Archives that a person fetches by hand, by name."""
    rows = range(9)
    hindi = [f"a\tb\tc\ten hindencorp {row}\thi hindencorp {row}\n" for row in rows] + [
        "too\tfew\n",
        "a\tb\tc\td\r\te\n",
    ]
    archives = {"hindencorp0.1.gz": gzip.compress("".join(hindi).encode(), mtime=0)}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for side in ("ru", "en"):
            archive.writestr(f"corpus.en_ru.1m.{side}", plain(sentences("yandex", side, 6)))
    archives["1mcorpus.zip"] = buffer.getvalue()
    for part in range(10):
        lines = "".join(f"id\t1.0\tcs czeng {part} {row} \ten czeng {part} {row}\n" for row in rows) + "\n"
        packed = gzip.compress(lines.encode(), mtime=0)
        archives[f"data-plaintext-format.{part}.tar"] = tar(
            {f"data.plaintext-format/0{part}train.gz": packed, f"data.plaintext-format/0{part}dtest.gz": b"unused"}
        )
    return archives


def published():
    """Archives by their address."""
    europarl, fr = "training/europarl-v7.{src}-en.{side}", ["fr"]
    news = "training/news-commentary-v9.{src}-en.{side}"
    news13 = "training-parallel-nc-v13/news-commentary-v13.{src}-en.{side}"
    giga = {f"giga-fren.release2.fixed.{side}.gz": plain(sentences("giga", side, 30)) for side in ("en", "fr")}
    slavic = ["cs", "de", "fr", "ru"]
    return {
        f"{STATMT}/wmt13/training-parallel-europarl-v7.tgz": tgz(both(europarl, "europarl", 40, ["cs", "de", "fr"])),
        f"{STATMT}/wmt13/training-parallel-commoncrawl.tgz": tgz(
            {"commoncrawl.de-en.annotation": b"x\n", **both("commoncrawl.{src}-en.{side}", "crawl", 30, slavic)}
        ),
        f"{STATMT}/wmt13/training-parallel-un.tgz": tgz(both("un/undoc.2000.{src}-en.{side}", "un", 20, fr)),
        f"{STATMT}/wmt14/training-parallel-nc-v9.tgz": tgz(both(news, "nc9", 25, slavic)),
        "http://data.statmt.org/wmt18/translation-task/training-parallel-nc-v13.tgz": tgz(
            both(news13, "nc", 25, ["de"])
        ),
        f"{STATMT}/wmt10/training-giga-fren.tar": tar({name: gzip.compress(lines) for name, lines in giga.items()}),
        f"{STATMT}/wmt14/wiki-titles.tgz": tgz({"wiki/hi-en/wiki-titles.hi-en": wiki("hi")}),
        f"{STATMT}/wmt15/wiki-titles.tgz": tgz({"wiki/ru-en/wiki.ru-en": wiki("ru")}),
        "http://data.statmt.org/wmt19/translation-task/dev.tgz": tgz(dev()),
    }


def record(monkeypatch, archives):
    """Makes these archives the ones whose checksums TFDS has recorded."""
    infos = {
        url: checksums.UrlInfo(
            size=len(content), checksum=hashlib.sha256(content).hexdigest(), filename=url.rpartition("/")[2]
        )
        for url, content in archives.items()
    }
    assert set(archives) <= set(checksums.get_all_url_infos())
    monkeypatch.setattr(checksums, "get_all_url_infos", lambda: infos)


def fill(folder: pathlib.Path, archives):
    """Writes archives into a manual folder by their names."""
    folder.mkdir(parents=True, exist_ok=True)
    for url, content in archives.items():
        (folder / url.rpartition("/")[2]).write_bytes(content)
