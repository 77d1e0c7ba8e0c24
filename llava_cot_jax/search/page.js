"use strict";
(() => {
  const main = document.getElementById("questions");
  const entries = [...main.querySelectorAll("details.entry")];
  const form = document.getElementById("filters");
  const count = document.getElementById("count");

  // What is folded lies in a noscript element, which a browser reads as one text: it becomes elements when it is opened.
  function unfold(entry) {
    const folded = entry.querySelector("noscript");
    if (!folded) return;
    const body = document.createElement("div");
    body.innerHTML = folded.textContent;
    folded.replaceWith(body);
  }

  function textOf(html) {
    const signs = { "&lt;": "<", "&gt;": ">", "&#34;": '"', "&#39;": "'", "&amp;": "&" };
    return html.replace(/<[^>]*>/g, " ").replace(/&(?:lt|gt|#34|#39|amp);/g, (sign) => signs[sign]);
  }

  const plain = (text) => text.toLowerCase().replace(/\s+/g, " ");
  let texts;
  function textsOfEntries() {
    texts ??= entries.map((entry) => {
      const folded = entry.querySelector("noscript");
      const body = folded ? folded.textContent : entry.lastElementChild.innerHTML;
      return plain(`${entry.firstElementChild.textContent} ${textOf(body)}`);
    });
    return texts;
  }

  function filter() {
    const wanted = new FormData(form);
    const text = plain(wanted.get("text")).trim();
    const words = text && textsOfEntries();
    let shown = 0;
    entries.forEach((entry, i) => {
      const has = (name) => !wanted.get(name) || entry.dataset[name] === wanted.get(name).slice(1);
      entry.hidden = !(has("result") && has("change") && has("category") && (!text || words[i].includes(text)));
      shown += !entry.hidden;
    });
    count.textContent = `${shown} of ${entries.length} questions shown`;
  }

  main.addEventListener("toggle", (event) => {
    if (event.target.matches("details.entry") && event.target.open) unfold(event.target);
  }, true);

  main.addEventListener("keydown", (event) => {
    const step = { j: 1, k: -1 }[event.key];
    if (!step || event.ctrlKey || event.altKey || event.metaKey) return;
    const shown = entries.filter((entry) => !entry.hidden);
    const place = shown.indexOf(event.target.closest("details.entry"));
    const next = shown[place < 0 ? 0 : place + step];
    if (next) next.firstElementChild.focus();
  });

  form.addEventListener("input", filter);
  form.querySelector("button").addEventListener("click", () => {
    form.reset();
    filter();
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  filter(); // the browser may have kept what was chosen before the page was loaded again
})();
