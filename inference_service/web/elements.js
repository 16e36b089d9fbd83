/** Builds parts of the page. Text from outside only ever becomes text, never markup. */

/**
 * Returns an element. Properties that begin with a letter and contain a dash, and `role`, become attributes.
 * @param {string} tag
 * @param {Object<string, any>} properties
 * @param {...(Node|string)} children
 */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "role" || name.includes("-")) element.setAttribute(name, value);
    else element[name] = value;
  }
  element.append(...children);
  return element;
}

/** Returns the element with an id. */
export function byId(id) {
  return document.getElementById(id);
}

/** Sets a text if it differs, so that nothing is read out or laid out again without a reason. */
export function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Shows a sentence in an element, or hides the element if there is none. */
export function say(element, sentence) {
  setText(element, sentence ?? "");
  element.hidden = !sentence;
}

/** Replaces the options of a select, and keeps the choice if it still exists. */
export function setOptions(select, options) {
  const same = select.options.length === options.length
    && options.every(([value, text], i) => select.options[i].value === value && select.options[i].text === text);
  if (same) return;
  const chosen = select.value;
  select.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (options.some(([value]) => value === chosen)) select.value = chosen;
}

/** Shows a dialog; returns the value of the button that closes it, empty for Escape. */
export function answer(dialog) {
  dialog.returnValue = "";
  dialog.showModal();
  return new Promise((resolve) => {
    dialog.addEventListener("close", () => resolve(dialog.returnValue), { once: true });
  });
}
