// What the user set: sampling and system prompt stay in this browser, the API key only in this tab.

const PLACE = "flashmoe.settings";
const KEY_PLACE = "flashmoe.api-key";
const NUMBERS = ["temperature", "top_p", "max_tokens", "seed"];

let current = read();
let key = attempt(() => sessionStorage.getItem(KEY_PLACE)) ?? "";

export const apiKey = () => key;
export const systemPrompt = () => current.system?.trim() ?? "";

/** The fields of a request that the user set. */
export function sampling() {
  return Object.fromEntries(NUMBERS.filter((name) => Number.isFinite(current[name])).map((name) => [name, current[name]]));
}

/** Let the dialog show the settings and change them; `changed` is called behind each change. */
export function bindSettings(dialog, changed) {
  const form = dialog.querySelector("form");
  const show = () => {
    form.elements.system.value = current.system ?? "";
    for (const name of NUMBERS) form.elements[name].value = current[name] ?? "";
    form.elements.key.value = key;
  };
  form.addEventListener("change", () => {
    take(form);
    changed();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (!form.reportValidity()) return;
    take(form);
    changed();
    dialog.close();
  });
  form.querySelector("#reset-settings").addEventListener("click", () => {
    current = {};
    attempt(() => localStorage.removeItem(PLACE));
    show();
    changed();
  });
  return (field) => {
    show();
    dialog.showModal();
    if (field) form.elements[field].focus();
  };
}

function take(form) {
  current = { system: form.elements.system.value };
  for (const name of NUMBERS) {
    const input = form.elements[name];
    if (input.value !== "" && input.validity.valid) current[name] = input.valueAsNumber;
  }
  key = form.elements.key.value.trim();
  attempt(() => localStorage.setItem(PLACE, JSON.stringify(current)));
  attempt(() => sessionStorage.setItem(KEY_PLACE, key));
}

function read() {
  return attempt(() => JSON.parse(localStorage.getItem(PLACE))) ?? {};
}

/** A browser may keep nothing for a page; then settings last as long as the page. */
function attempt(access) {
  try {
    return access();
  } catch {
    return null;
  }
}
