// The site's search, in place of Fuse: words instead of strings that look alike. A page is found by its text and by
// what people type for it (docs/search.yml); pages for users come before the reference, and that before how it is built.
(() => {
  "use strict";
  const wordsOf = (s) => (s || "").toLowerCase().match(/[a-z0-9_]+/g) || [];
  const begins = (w, word) => w.startsWith(word) || w.split("_").some((part) => part.startsWith(word));

  const distance1 = (a, b) => {   // is it one letter more, less, changed, or two in the other order?
    if (Math.abs(a.length - b.length) > 1 || a === b) return false;
    let i = 0, j = 0;
    while (i < a.length && a[i] === b[i]) i++;
    while (j < Math.min(a.length, b.length) - i && a[a.length - 1 - j] === b[b.length - 1 - j]) j++;
    const [x, y] = [a.slice(i, a.length - j), b.slice(i, b.length - j)];
    return (x.length <= 1 && y.length <= 1) || (x.length === 2 && y.length === 2 && x[0] === y[1] && x[1] === y[0]);
  };

  window.Fuse = class {
    constructor(entries) {
      this.pages = new Map();   // address -> what its sections share
      this.postings = { title: new Map(), section: new Map(), text: new Map(), typed: new Map() };   // word -> numbers of entries, or addresses -> how often
      this.entries = entries.map((item, i) => {
        const [address, anchor] = item.href.split("#");
        if (!this.pages.has(address)) this.pages.set(address, { typed: [], rank: item.rank || 0 });
        const page = this.pages.get(address), typed = (item.typed || []).map((phrase) => wordsOf(phrase).join(" "));
        page.typed.push(...typed);
        this.post("title", wordsOf(item.title), address);
        this.post("typed", typed.flatMap((phrase) => phrase.split(" ")), address);
        this.post("section", wordsOf(item.section), i);
        this.post("text", wordsOf(item.text), i);
        return { item, page, address, top: !anchor };
      });
      this.known = [...new Set([...this.postings.title.keys(), ...this.postings.typed.keys()])];   // what a misspelled word may stand for
    }

    post(field, words, place) {
      for (const w of words) {
        if (!this.postings[field].has(w)) this.postings[field].set(w, new Map());
        const places = this.postings[field].get(w);
        places.set(place, (places.get(place) || 0) + 1);
      }
    }

    // Place -> how well the word fits there: as a whole word, or as the beginning of one
    fits(field, word) {
      const res = new Map();
      if (word.length > 2) for (const [w, places] of this.postings[field]) if (begins(w, word)) for (const place of places.keys()) res.set(place, 0.5);
      for (const [place, n] of this.postings[field].get(word) || []) res.set(place, 1 + Math.log(n) / 4);
      return res;
    }

    phraseScore(page, query) {
      let best = 0;
      for (const phrase of page.typed) {
        if (phrase === query) return 40;
        const words = phrase.split(" ");
        const fits = query.split(" ").filter((q) => words.some((w) => w === q || (q.length > 2 && w.startsWith(q)))).length;
        if (fits === query.split(" ").length) best = Math.max(best, 22 * fits / words.length);
      }
      return best;
    }

    rate(query) {
      const words = query.split(" ");
      const found = words.map((word) => {
        const fit = Object.fromEntries(Object.keys(this.postings).map((field) => [field, this.fits(field, word)]));
        fit.page = new Set([...fit.title.keys(), ...fit.typed.keys()]);   // pages that have the word anywhere
        for (const i of [...fit.section.keys(), ...fit.text.keys()]) fit.page.add(this.entries[i].address);
        return fit;
      });
      const phrases = new Map([...this.pages].map(([address, page]) => [address, this.phraseScore(page, query)]));
      const res = [];
      this.entries.forEach((e, i) => {
        if (!found.every((fit) => fit.page.has(e.address))) return;
        let score = 0, here = 0;
        for (const { title, section, text, typed } of found) {
          const of = [title.get(e.address) || 0, section.get(i) || 0, text.get(i) || 0];
          if (of.some((fit) => fit)) here++;
          score += 5 * of[0] + 5 * of[1] + 2 * of[2] + (typed.has(e.address) ? 2 : 0);
        }
        const phrase = phrases.get(e.address);
        if (!here && !phrase) return;
        if (!e.top && here < words.length) score = 0;   // a section has the words itself
        score = (score + (e.top ? phrase + 1 : phrase / 4)) * [1, 0.7, 0.35][e.page.rank];
        if (score > 0) res.push({ item: e.item, address: e.address, score });
      });
      return res.sort((a, b) => b.score - a.score);
    }

    search(q, { limit = 20 } = {}) {
      const words = wordsOf(q);
      if (!words.length) return [];
      let found = this.rate(words.join(" "));
      if (!found.length) {   // a letter is wrong somewhere
        const near = words.map((w) => this.known.includes(w) || w.length < 4 ? w : this.known.find((k) => distance1(w, k)) || w);
        found = this.rate(near.join(" "));
      }
      if (!found.length && words.length > 1) {   // what has any of the words
        const best = new Map();
        for (const r of words.filter((w) => w.length > 2).flatMap((w) => this.rate(w))) {
          const before = best.get(r.item);
          best.set(r.item, { ...r, score: r.score + (before ? before.score : 0) });
        }
        found = [...best.values()].sort((a, b) => b.score - a.score);
      }
      const perPage = new Map();   // at most three sections of a page
      return found.filter((r) => perPage.set(r.address, (perPage.get(r.address) || 0) + 1).get(r.address) <= 3).slice(0, limit);
    }
  };
})();
