// Short ways to say what a page of plain DOM says often.

export const byId = (id) => document.getElementById(id);

/** An element with properties and children. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key.includes("-") || key === "role") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children);
  return made;
}

/** Set text only where it differs, so that nothing is laid out or announced anew for nothing. */
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
