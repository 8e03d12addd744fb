/* The search page shows prose of each page found; book/_ext/search_prose.py gathers it. */

const LENGTH = 240, BEFORE = 80;  // characters of an excerpt, and of it before the word

window.fetch = async (page) => ({ text: () => page });  // nothing need be fetched

Search.makeSearchSummary = (page, terms, anchor) => {
  const all = PROSE[page.replace(/^(\.\/)?(.*)\.html$/, "$2")] ?? [];
  const near = all.filter(([section]) => !anchor || section === anchor);
  const places = near.map(([, text]) => [...terms]
    .map(term => text.toLowerCase().indexOf(term)).filter(place => place >= 0));
  const worth = near.map(([, text], i) =>
    places[i].length * LENGTH + Math.min(text.length, LENGTH - 1));  // no bare list items
  const best = worth.indexOf(Math.max(...worth)), summary = document.createElement("p");
  summary.className = "context";
  if (near.length) summary.textContent = excerpt(near[best][1], Math.min(...places[best]));
  return summary;
};

/** About `LENGTH` characters of whole words, those at `place` among them. */
function excerpt(text, place) {
  const late = Number.isFinite(place) && place > LENGTH - BEFORE;
  const start = late ? text.indexOf(" ", place - BEFORE) + 1 : 0;
  const whole = text.length <= start + LENGTH;
  const end = whole ? text.length : text.lastIndexOf(" ", start + LENGTH);
  return (start ? "… " : "") + text.slice(start, end) + (whole ? "" : " …");
}
