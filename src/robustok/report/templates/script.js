for (const viewer of document.querySelectorAll('.slider')) {
  const label = viewer.querySelector('label');
  label.hidden = false;
  label.querySelector('input').addEventListener('input',
    event => viewer.style.setProperty('--after', event.target.value + '%'));
}
