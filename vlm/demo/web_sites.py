"""What the pages of `vlm.demo.web_pages` say: ten small sites, none of which exists, and the words of their buttons."""
# ruff: noqa: E501  (several words on a line)

from dataclasses import dataclass
from typing import Literal

Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Site:
    """A site.

    Attributes:
        host: of its addresses.
        sections: of its menu.
        items: what it sells, tells or keeps: name and a sentence.
        accent: its colour.
        font: CSS family.
    """

    name: str
    host: str
    language: Language
    sections: tuple[str, ...]
    items: tuple[tuple[str, str], ...]
    accent: str
    font: str


def _site(name: str, language: Language, sections: str, accent: str, font: str, items: str) -> Site:
    lines = [line.strip().partition(": ") for line in items.strip().splitlines()]
    host = "".join(letter for letter in name.lower() if letter.isascii() and letter.isalnum()) or "example"
    found = tuple((head, text) for head, _, text in lines)
    return Site(name, f"{host}.example", language, tuple(sections.split(", ")), found, accent, font)


SITES = (
    _site("Birch & Bolt", "en", "Tools, Timber, Garden, Paint, Offers", "#8a4b1f", "DejaVu Sans", """
        Block plane: Takes off a shaving as thin as paper.
        Brass hinge: Two of them carry a garden door.
        Oak board: Dried for a year, planed on both sides.
        Wood glue: Holds after twenty minutes, forever after a day.
        Folding rule: Two metres, ten joints, no batteries.
        Clamp set: Four clamps that open as wide as a hand is long.
        Work gloves: Leather on the palm, cotton on the back.
        Linseed oil: Brings out the grain of dark wood."""),
    _site("Harbour Times", "en", "Town, Sea, Weather, Sport, Letters", "#0b4f8a", "DejaVu Serif", """
        Ferry returns after winter: The first boat leaves at seven and is back before dark.
        Storm moves the sandbank: Pilots ask captains to keep to the western channel.
        Old lighthouse gets new glass: The panes were cut by the town's last glazier.
        Market moves to Thursday: Fishmongers had asked for it since spring.
        School choir wins again: Their song about herring took the silver cup.
        Bridge closed for paint: Walkers may pass, carts may not.
        A seal on platform two: The eight o'clock train waited until it had left.
        Letters: who owns the pier?: Our readers have eleven answers."""),
    _site("Trailhead", "en", "Routes, Huts, Maps, Gear, Journal", "#2f6b3a", "DejaVu Sans", """
        Ridge of nine peaks: Fourteen hours, one spring, no shade.
        Lake loop: Flat, short and full of frogs.
        Glacier hut: Sixty beds, soup at six, silence at ten.
        Valley bus 14: Runs on the hour until the snow comes.
        Map sheet 27: One inch for a mile, printed on cloth.
        Rope bridge: Closed when the wind is over forty.
        Winter room: Always open, bring your own wood.
        Stone path: Laid by hand a hundred years ago."""),
    _site("Pocket Bank", "en", "Accounts, Cards, Savings, Loans, Help", "#3c2a80", "DejaVu Sans", """
        Everyday account: Free for everyone under twenty-six.
        Travel card: Pays abroad without a fee.
        Rainy day savings: Puts your small change aside.
        House loan: Fixed for ten years, paid back in twenty.
        Standing order: Rent leaves on the first of the month.
        Lost card: Lock it here, unlock it when it turns up.
        Statement for May: Thirty-one entries, two pages.
        New device: Confirm it with the one you have."""),
    _site("Kitchen Notes", "en", "Soups, Bread, Fish, Sweets, Pantry", "#b03a2e", "DejaVu Serif", """
        Leek and potato soup: Half an hour, one pot, four bowls.
        Rye bread: Starts the evening before.
        Baked mackerel: Needs salt, a lemon and a hot oven.
        Plum cake: Better on the second day.
        Pickled beets: Keep a year in a cool cellar.
        Barley salad: Good with whatever is green.
        Onion tart: Cut the onions thin and take your time.
        Poppy seed rolls: Twelve small ones or eight large ones."""),
    _site("Slowmail", "en", "Inbox, Drafts, Sent, Archive, Labels", "#455a64", "DejaVu Sans", """
        Your parcel is at the corner shop: Bring the number and something with your name on it.
        Minutes of Tuesday: Three of us came, two things were decided.
        Garden plan, third try: I moved the pear tree again.
        Invoice 2207: Due in fourteen days, thank you.
        Seats for Friday?: Row nine, or the balcony if you like.
        Photos of the lake: Grandmother is in the last one.
        Your library loan ends soon: Renew it once, for two weeks.
        Train times changed: The 8:14 now leaves at 8:09."""),
    _site("Campus Desk", "en", "Courses, Timetable, Library, Exams, Rooms", "#00695c", "DejaVu Sans", """
        Algebra II: Rings, fields and a written exam.
        History of paper: From rags to screens, with a trip to a mill.
        Field botany: Boots are required, umbrellas welcome.
        Night sky lab: Only when there are no clouds.
        Reading Dante: In translation, one canto a week.
        Data structures: Trees are easier than they look.
        Choir: No audition, just come.
        Swedish for beginners: Twelve evenings, one book."""),
    _site("云上书店", "zh", "小说, 历史, 科学, 童书, 特价", "#ad1457", "WenQuanYi Micro Hei", """
        山中来信: 一个邮差和他的三百封信。
        古桥图录: 收入一百二十座石桥的照片。
        夜空入门: 不用望远镜也能看懂的星星。
        会飞的猫: 适合五岁以上的孩子。
        茶的历史: 从山坡到茶杯的两千年。
        小城故事: 十二个短篇，十二条街。
        纸上花园: 手绘植物，附种植方法。
        海边的灯塔: 一家三代守灯人的生活。"""),
    _site("Green Line Transit", "en", "Plan, Lines, Tickets, Alerts, Contact", "#1b7f3b", "DejaVu Sans", """
        Line 4 to the harbour: Every eight minutes until midnight.
        Day ticket: Valid until four the next morning.
        Lift out of order: Use the ramp at the north exit.
        Night bus N2: Leaves from platform one.
        Student pass: Half price with a card of your school.
        Lost and found: Open on weekdays from nine to five.
        New stop Mill Street: Opens on the first of June.
        Bicycle space: In the last car, not in rush hour."""),
    _site("南山医院", "zh", "挂号, 科室, 报告, 缴费, 帮助", "#00838f", "WenQuanYi Micro Hei", """
        内科门诊: 周一至周六，上午八点开始。
        儿科门诊: 请带上孩子的疫苗本。
        眼科检查: 检查后四小时内不要开车。
        体检套餐: 包括血液、心电图和胸片。
        报告查询: 两个工作日后可以查看。
        停车指南: 东门停车场前两小时免费。
        预约修改: 请至少提前一天修改。
        药房取药: 凭处方号在三号窗口取药。"""),
)  # fmt: skip
TEST_SITES = ("Green Line Transit", "南山医院")
"""Held out with all their pages."""

UI: dict[Language, dict[str, str]] = {
    "en": {
        "search": "Search", "login": "Log in", "register": "Create account", "email": "E-mail", "password": "Password",
        "name": "Full name", "city": "City", "send": "Send", "cancel": "Cancel", "save": "Save changes", "add": "Add to basket",
        "more": "Read more", "next": "Next", "back": "Previous", "sort": "Sort by", "date": "Date", "people": "People",
        "book": "Book now", "message": "Message", "remember": "Stay signed in", "forgot": "Forgot password?",
        "settings": "Settings", "language": "Language", "news": "Send me news", "dark": "Dark colours", "sound": "Sounds",
        "results": "results for", "reply": "Reply", "delete": "Delete", "edit": "Edit", "total": "Total", "status": "Status",
        "open": "open", "done": "done", "help": "Help", "home": "Home", "basket": "Basket", "contents": "Contents",
        "options": "newest|cheapest|nearest", "cities": "Northport|Millbrook|Ashford", "days": "Mon|Tue|Wed|Thu|Fri|Sat|Sun",
    },
    "zh": {
        "search": "搜索", "login": "登录", "register": "注册", "email": "邮箱", "password": "密码",
        "name": "姓名", "city": "城市", "send": "发送", "cancel": "取消", "save": "保存", "add": "加入购物车",
        "more": "阅读更多", "next": "下一页", "back": "上一页", "sort": "排序", "date": "日期", "people": "人数",
        "book": "立即预约", "message": "留言", "remember": "保持登录", "forgot": "忘记密码？",
        "settings": "设置", "language": "语言", "news": "接收通知", "dark": "深色模式", "sound": "声音",
        "results": "条结果：", "reply": "回复", "delete": "删除", "edit": "编辑", "total": "合计", "status": "状态",
        "open": "处理中", "done": "已完成", "help": "帮助", "home": "首页", "basket": "购物车", "contents": "目录",
        "options": "最新|最便宜|最近", "cities": "北京|上海|广州", "days": "一|二|三|四|五|六|日",
    },
}  # fmt: skip
