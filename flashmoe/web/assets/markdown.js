// Markdown that grows: only blocks that changed are drawn again, so that what is finished can be selected and read.
//
// What a model writes is hostile until shown otherwise. HTML in it is shown as text, pictures become links (loading
// one would tell its server about the conversation), and what comes out is sanitised all the same.

import DOMPurify from "./vendor/dompurify/purify.es.js";
import { Marked } from "./vendor/marked/marked.esm.js";

const SANITISED = {
  ALLOWED_TAGS: ["a", "blockquote", "br", "code", "del", "em", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong", "table", "tbody", "td", "th", "thead", "tr", "ul"],
  ALLOWED_ATTR: ["align", "data-language", "href", "start", "title"],
  ADD_URI_SAFE_ATTR: ["align", "data-language", "start"], // no addresses: the next but one rule is not for them
  ALLOW_ARIA_ATTR: false,
  ALLOW_DATA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<p>${escaped(text)}</p>` : escaped(text)),
    image: ({ href, text }) => `<a href="${escaped(href)}">${escaped(text || href)}</a>`,
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    code: ({ text, lang }) => `<pre data-language="${escaped((lang ?? "").split(/\s/)[0])}"><code>${escaped(text)}</code></pre>`,
    heading({ tokens, depth }) {
      const level = Math.min(6, depth + 2); // the page has the first two
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

/** The rendered text of one answer, inside `root`. */
export class MarkdownView {
  /** `finished(text)` is called with each block of an answer that will not change any more. */
  constructor(root, finished = () => {}) {
    this.root = root;
    this.finished = finished;
    this.blocks = []; // {raw, node}
    this.told = 0;
  }

  /** Show `text`; `isWhole` when nothing more will come. */
  show(text, isWhole) {
    const tokens = marked.lexer(text).filter((token) => token.type !== "space");
    tokens.forEach((token, i) => {
      const raw = token.raw.trimEnd(); // the empty line behind a block belongs to it, and comes later
      if (this.blocks[i]?.raw === raw) return;
      const node = document.createElement("div");
      node.append(draw(token));
      if (this.blocks[i]) this.blocks[i].node.replaceWith(node);
      else this.root.append(node);
      this.blocks[i] = { raw, node };
    });
    for (const { node } of this.blocks.splice(tokens.length)) node.remove();
    const settled = isWhole ? this.blocks.length : this.blocks.length - 1;
    for (; this.told < settled; this.told++) this.finished(this.blocks[this.told].node.innerText);
  }
}

function draw(token) {
  const fragment = DOMPurify.sanitize(marked.parser([token]), SANITISED);
  for (const link of fragment.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const table of fragment.querySelectorAll("table")) scrollable(table, "Table");
  for (const pre of fragment.querySelectorAll("pre")) withCopyButton(pre);
  return fragment;
}

function withCopyButton(pre) {
  const box = document.createElement("div");
  const head = document.createElement("div");
  const language = document.createElement("span");
  const copy = document.createElement("button");
  box.className = "code";
  head.className = "code-head";
  language.textContent = pre.dataset.language || "text";
  copy.type = "button";
  copy.textContent = "Copy";
  copy.addEventListener("click", () => copyText(pre.innerText, copy));
  pre.replaceWith(box);
  head.append(language, copy);
  box.append(head, pre);
  pre.tabIndex = 0; // it scrolls sideways
  pre.setAttribute("role", "region");
  pre.setAttribute("aria-label", "Code");
}

function scrollable(table, name) {
  const box = document.createElement("div");
  box.className = "scroll";
  box.tabIndex = 0;
  box.setAttribute("role", "region");
  box.setAttribute("aria-label", name);
  table.replaceWith(box);
  box.append(table);
}

/** Copy, and let the button say how it went. */
export async function copyText(text, button) {
  const before = button.dataset.name ?? button.textContent;
  button.dataset.name = before;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    button.textContent = "Select and copy by hand"; // no clipboard: not HTTPS or localhost, or not allowed
  }
  setTimeout(() => (button.textContent = before), 2000);
}

function escaped(text) {
  return text.replace(/[&<>"']/g, (sign) => `&#${sign.charCodeAt(0)};`);
}
