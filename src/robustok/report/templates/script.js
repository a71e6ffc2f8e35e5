for (const viewer of document.querySelectorAll('.slider')) {
  const label = viewer.querySelector('label');
  label.hidden = false;
  label.querySelector('input').addEventListener('input',
    event => viewer.style.setProperty('--after', event.target.value + '%'));
}

// The cells of a table as text. A name that stands for several rows is repeated; minus signs become hyphens.
function cells(table) {
  let name = '';
  return [...table.rows].map(row => [...row.cells].map((cell, column) => {
    const parts = [...cell.childNodes].map(node => node.textContent.replace(/\s+/g, ' ').trim());
    const text = parts.filter(Boolean).join(' ').replaceAll('\u2212', '-');
    if (column === 0 && table.matches('.results')) name = text || name;
    return column === 0 ? text || name : text;
  }));
}
// Text that a spreadsheet would take for a formula gets an apostrophe; numbers do not.
function csv(rows) {
  const field = text => (/^[=@\t]|^[+-](?![\d.])/.test(text) ? "'" : '') + text;
  return rows.map(row => row.map(text => `"${field(text).replaceAll('"', '""')}"`).join(',')).join('\r\n') + '\r\n';
}
function markdown(rows) {
  const line = row => `| ${row.map(text => text.replace(/[\\|]/g, '\\$&')).join(' | ')} |`;
  return [line(rows[0]), line(rows[0].map(() => '---')), ...rows.slice(1).map(line)].join('\n') + '\n';
}
async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {  // an old browser, or one that asks for permission
    const area = document.createElement('textarea');
    area.value = text;
    document.body.append(area);
    area.select();
    const done = document.execCommand('copy');
    area.remove();
    if (!done) throw new Error('the browser refused');
  }
}
for (const bar of document.querySelectorAll('.copies')) {
  bar.hidden = false;
  const table = bar.nextElementSibling.querySelector('table'), status = bar.querySelector('span');
  bar.addEventListener('click', async event => {
    const kind = event.target.value;
    if (!kind) return;
    const text = kind === 'csv' ? csv(cells(table)) : markdown(cells(table));
    status.textContent = await copy(text).then(() => 'copied', error => error.message);
  });
}
// What was unfolded stays so when the page loads itself again, while it is watched.
if (document.querySelector('meta[http-equiv=refresh]')) {
  const folds = [...document.querySelectorAll('details')], key = 'unfolded ' + location.pathname;
  const names = () => folds.filter(fold => fold.open).map(fold => fold.querySelector('summary').textContent);
  const before = JSON.parse(sessionStorage.getItem(key) || '[]');
  for (const fold of folds) {
    fold.open = before.includes(fold.querySelector('summary').textContent);
    fold.addEventListener('toggle', () => sessionStorage.setItem(key, JSON.stringify(names())));
  }
}
