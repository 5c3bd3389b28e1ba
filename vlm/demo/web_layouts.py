"""Ten kinds of web pages of the sites of `vlm.demo.web_sites`: lists, articles, forms, tables, calendars, mail."""
# ruff: noqa: E501  (HTML stays on a line)

from collections.abc import Callable
from html import escape
from random import Random

from vlm.demo.web_sites import UI, Site

_SHAPES = (
    '<circle cx="40" cy="34" r="22" fill="{0}"/><rect x="18" y="52" width="44" height="8" fill="#888"/>',
    '<rect x="16" y="14" width="48" height="40" rx="6" fill="{0}"/><circle cx="40" cy="34" r="10" fill="#fff"/>',
    '<path d="M10 60 L34 16 L48 42 L56 30 L70 60 Z" fill="{0}"/><circle cx="62" cy="16" r="7" fill="#f2b705"/>',
    '<path d="M40 8 L68 34 L58 34 L58 62 L22 62 L22 34 L12 34 Z" fill="{0}"/>',
)
_STYLE = """
*{{box-sizing:border-box}} html{{overflow:hidden}}
body{{margin:0;font:{size}px '{font}',sans-serif;color:#222;background:#fafafa}}
header{{background:{accent};color:#fff;padding:10px 18px;display:flex;flex-wrap:wrap;gap:6px 18px;align-items:center}}
header a{{color:#fff;text-decoration:none}} header b{{font-size:1.3em;margin-right:12px}}
main{{max-width:1080px;margin:0 auto;padding:16px 18px}} a{{color:{accent}}}
h1{{font-size:1.7em;margin:.3em 0}} h2{{font-size:1.2em;margin:.6em 0 .3em}}
button,.button{{background:{accent};color:#fff;border:0;border-radius:{radius}px;padding:7px 14px;font:inherit}}
button.plain{{background:#fff;color:{accent};border:1px solid {accent}}}
input,select,textarea{{font:inherit;padding:6px 8px;border:1px solid #999;border-radius:{radius}px;background:#fff}}
.grid{{display:grid;grid-template-columns:repeat(auto-fill,minmax(200px,1fr));gap:14px}}
.card{{background:#fff;border:1px solid #ddd;border-radius:{radius}px;padding:12px}}
form.stack{{display:grid;gap:10px;max-width:420px}} form.stack label{{display:grid;gap:3px}}
table{{border-collapse:collapse;width:100%;background:#fff}} td,th{{border:1px solid #ddd;padding:7px 10px;text-align:left}}
.row{{display:flex;gap:10px;align-items:center;flex-wrap:wrap}} .two{{display:grid;grid-template-columns:200px 1fr;gap:20px}}
footer{{border-top:1px solid #ddd;padding:10px 18px;font-size:.85em;display:flex;gap:16px}}
@media (max-width:640px){{.two{{grid-template-columns:1fr}}}}
"""
Words = dict[str, str]


def page(site: Site, layout: str, random: Random) -> str:
    """A whole page of a site."""
    words = UI[site.language]
    menu = "".join(f'<a href="/{at}">{escape(name)}</a>' for at, name in enumerate(site.sections))
    style = _STYLE.format(
        size=random.choice((14, 15, 16, 18)), font=site.font, accent=site.accent, radius=random.choice((0, 3, 6, 16))
    )
    search = f'<input type="search" name="q" placeholder="{words["search"]}">' if random.random() < 0.7 else ""
    return (
        f'<!doctype html><html lang="{site.language}"><head><meta charset="utf-8"><title>{escape(site.name)}</title>'
        f"<style>{style}</style></head><body>\n<header><b>{escape(site.name)}</b>{menu}{search}"
        f'<a href="/login">{words["login"]}</a></header>\n<main>\n{LAYOUTS[layout](site, words, random)}\n</main>\n'
        f'<footer><a href="/help">{words["help"]}</a><a href="/">{words["home"]}</a><span>{site.host}</span></footer>\n'
        "</body></html>\n"
    )


def _items(site: Site, random: Random, count: int) -> list[tuple[str, str]]:
    return [(escape(name), escape(text)) for name, text in random.sample(site.items, min(count, len(site.items)))]


def _image(name: str, site: Site, random: Random, size: int = 80) -> str:
    shape = random.choice(_SHAPES).format(random.choice((site.accent, "#5c8aa8", "#c98f4b", "#6b8e5a")))
    label = f'role="img" aria-label="{name}" viewBox="0 0 80 68" width="{size}" height="{size * 17 // 20}"'
    return f"<svg {label}>{shape}</svg>"


def _select(name: str, label: str, options: str) -> str:
    found = "".join(f"<option>{option}</option>" for option in options.split("|"))
    return f'<select name="{name}" aria-label="{label}">{found}</select>'


def _field(name: str, label: str, kind: str = "text") -> str:
    return f'<label>{label}<input type="{kind}" name="{name}" placeholder="{label}"></label>'


def _shop(site: Site, words: Words, random: Random) -> str:
    cards = "".join(
        f'<div class="card">{_image(name, site, random)}<h2>{name}</h2><p>{text}</p><div class="row">'
        f"<b>{random.randint(3, 90)}.{random.choice(('00', '50', '90'))}</b><button>{words['add']}</button></div></div>"
        for name, text in _items(site, random, 8)
    )
    sort = _select("sort", words["sort"], words["options"])
    title = escape(random.choice(site.sections))
    return f'<div class="row"><h1>{title}</h1>{sort}<a href="/basket">{words["basket"]}</a></div><div class="grid">{cards}</div>'


def _article(site: Site, words: Words, random: Random) -> str:
    (title, lead), *others = _items(site, random, 6)
    body = "".join(f"<p>{text} {lead}</p>" for _, text in others[:3])
    links = "".join(f'<li><a href="/{at}">{name}</a></li>' for at, (name, _) in enumerate(others))
    return (
        f'<div class="two"><nav><h2>{words["more"]}</h2><ul>{links}</ul></nav><article><h1>{title}</h1>'
        f"<p><b>{lead}</b></p>{_image(title, site, random, 260)}{body}<button>{words['next']}</button></article></div>"
    )


def _login(site: Site, words: Words, random: Random) -> str:
    return (
        f'<div class="card" style="max-width:460px;margin:30px auto"><h1>{words["login"]}</h1><form class="stack">'
        f"{_field('email', words['email'], 'email')}{_field('password', words['password'], 'password')}"
        f'<span class="row"><input type="checkbox" name="stay" aria-label="{words["remember"]}">{words["remember"]}</span>'
        f'<div class="row"><button>{words["login"]}</button><a href="/forgot">{words["forgot"]}</a></div></form>'
        f'<p><a href="/register">{words["register"]}</a></p></div>'
    )


def _register(site: Site, words: Words, random: Random) -> str:
    fields = [
        ("name", words["name"], "text"),
        ("email", words["email"], "email"),
        ("password", words["password"], "password"),
    ]
    random.shuffle(fields)
    city = f"<label>{words['city']}{_select('city', words['city'], words['cities'])}</label>"
    return (
        f'<h1>{words["register"]}</h1><form class="stack">{"".join(_field(*field) for field in fields)}{city}'
        f'<span class="row"><input type="checkbox" name="news" aria-label="{words["news"]}">{words["news"]}</span>'
        f'<div class="row"><button>{words["register"]}</button><button class="plain">{words["cancel"]}</button></div></form>'
    )


def _settings(site: Site, words: Words, random: Random) -> str:
    switches = "".join(
        f'<tr><td>{words[key]}</td><td><input type="checkbox" name="{key}" aria-label="{words[key]}"></td></tr>'
        for key in random.sample(("news", "dark", "sound", "remember"), 4)
    )
    language = _select("language", words["language"], "English|中文|Svenska")
    menu = "".join(f'<li><a href="/{at}">{escape(name)}</a></li>' for at, name in enumerate(site.sections))
    return (
        f'<div class="two"><nav><ul>{menu}</ul></nav><section><h1>{words["settings"]}</h1><table>{switches}'
        f"<tr><td>{words['language']}</td><td>{language}</td></tr></table><p class='row'><button>{words['save']}</button>"
        f'<button class="plain">{words["cancel"]}</button></p></section></div>'
    )


def _results(site: Site, words: Words, random: Random) -> str:
    found = "".join(
        f'<div class="card" style="margin-bottom:10px"><a href="/{at}"><b>{name}</b></a><p>{text}</p>'
        f"<small>{site.host}/{at}</small></div>"
        for at, (name, text) in enumerate(_items(site, random, 6))
    )
    pages = "".join(f'<a class="button" href="?page={at}">{at}</a>' for at in range(1, 5))
    query = escape(random.choice(site.items)[0].split()[0])
    return (
        f"<p>{random.randint(12, 940)} {words['results']} <b>{query}</b></p>{found}"
        f'<div class="row"><button class="plain">{words["back"]}</button>{pages}<button>{words["next"]}</button></div>'
    )


def _table(site: Site, words: Words, random: Random) -> str:
    rows = "".join(
        f"<tr><td>{random.randint(1000, 9999)}</td><td>{name}</td><td>{random.choice((words['open'], words['done']))}</td>"
        f'<td>{random.randint(2, 400)}.00</td><td><a href="/edit/{at}">{words["edit"]}</a> '
        f'<button class="plain">{words["delete"]}</button></td></tr>'
        for at, (name, _) in enumerate(_items(site, random, 8))
    )
    head = "".join(f"<th>{word}</th>" for word in ("#", words["name"], words["status"], words["total"], ""))
    sort = _select("sort", words["sort"], words["options"])
    title = f'<div class="row"><h1>{escape(site.sections[0])}</h1>{sort}<button>{words["save"]}</button></div>'
    return f"{title}<table><tr>{head}</tr>{rows}</table>"


def _calendar(site: Site, words: Words, random: Random) -> str:
    days = words["days"].split("|")
    first = random.randrange(7)
    cells = [""] * first + [str(day) for day in range(1, random.choice((30, 31)) + 1)]
    cells += [""] * (-len(cells) % 7)
    rows = "".join(
        "<tr>"
        + "".join(f"<td><a href='?day={day}'>{day}</a></td>" if day else "<td></td>" for day in cells[at : at + 7])
        + "</tr>"
        for at in range(0, len(cells), 7)
    )
    name, text = _items(site, random, 1)[0]
    return (
        f'<h1>{name}</h1><p>{text}</p><div class="row"><button class="plain">{words["back"]}</button><b>{words["date"]}</b>'
        f'<button class="plain">{words["next"]}</button></div><table><tr>{"".join(f"<th>{day}</th>" for day in days)}</tr>'
        f'{rows}</table><p class="row">{_select("people", words["people"], "1|2|3|4")}<button>{words["book"]}</button></p>'
    )


def _mail(site: Site, words: Words, random: Random) -> str:
    lines = "".join(
        f'<tr><td><input type="checkbox" name="m{at}" aria-label="{name}"></td><td><a href="/m/{at}">{name}</a></td>'
        f"<td>{text}</td><td>{random.randint(1, 28)}.{random.randint(1, 12)}.</td></tr>"
        for at, (name, text) in enumerate(_items(site, random, 8))
    )
    folders = "".join(f'<li><a href="/{at}">{escape(name)}</a></li>' for at, name in enumerate(site.sections))
    tools = f"<button>{words['reply']}</button><button class='plain'>{words['delete']}</button>"
    return f'<div class="two"><nav><ul>{folders}</ul></nav><section><p class="row">{tools}</p><table>{lines}</table></section></div>'


def _contact(site: Site, words: Words, random: Random) -> str:
    questions = "".join(f"<h2>{name}</h2><p>{text}</p>" for name, text in _items(site, random, 3))
    return (
        f'<div class="two"><section>{questions}</section><form class="stack"><h1>{words["message"]}</h1>'
        f"{_field('name', words['name'])}{_field('email', words['email'], 'email')}"
        f'<textarea name="message" rows="5" placeholder="{words["message"]}"></textarea>'
        f'<div class="row"><button>{words["send"]}</button><button class="plain">{words["cancel"]}</button></div></form></div>'
    )


LAYOUTS: dict[str, Callable[[Site, Words, Random], str]] = {
    "shop": _shop,
    "article": _article,
    "login": _login,
    "register": _register,
    "settings": _settings,
    "results": _results,
    "table": _table,
    "calendar": _calendar,
    "mail": _mail,
    "contact": _contact,
}
